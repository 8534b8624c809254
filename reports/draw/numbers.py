"""Write numbers, in tables and on axes. A missing number is a dash, never 0."""

from __future__ import annotations

import math

MISSING = "–"
#: Status -> its name in a cell.
STATUS_WORDS = {
    "oom": "out of memory",
    "timeout": "timed out",
    "diverged": "diverged",
    "crashed": "crashed",
    "unsupported": "unsupported",
}
#: The same where a heat map's cell leaves little room.
SHORT_STATUS_WORDS = STATUS_WORDS | {"oom": "OOM", "timeout": "time", "unsupported": "n/a"}


def significant(value: float | None, digits: int = 3) -> str:
    """Return `digits` significant digits with thousands separators, in exponent form only below 1e-4."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def fixed(value: float | None, decimals: int) -> str:
    """Return a number with a fixed number of decimals."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:,.{decimals}f}"


def number_text(value: float | None, unit: str) -> str:
    """Return a number as its unit wants it. Bytes, shares and FLOPs bring their unit along."""
    if value is None or not math.isfinite(value):
        return MISSING
    if unit == "share":
        return percent(value)
    if unit == "bytes":
        return bytes_text(value)
    if unit == "bytes/s":
        return f"{bytes_text(value)}/s"
    if "FLOP" in unit or unit == "parameters":
        return scaled(value)
    if unit in ("bits/byte", "nats"):
        return fixed(value, 3)
    if unit in ("tokens", "tokens/s") or (unit == "" and value == round(value)):
        return integer(value)
    return significant(value)


def integer(value: float | None) -> str:
    """Return "1,234,567"."""
    return MISSING if value is None or not math.isfinite(value) else f"{round(value):,}"


def percent(value: float | None) -> str:
    """Return 0.934 as "93%"."""
    return MISSING if value is None or not math.isfinite(value) else f"{100 * value:.0f}%"


def scaled(value: float | None) -> str:
    """Return "1.23 M", for counts of parameters and FLOPs, where three digits are enough."""
    if value is None or not math.isfinite(value):
        return MISSING
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            amount = value / limit
            return f"{amount:,.0f} {unit}" if amount == round(amount) else f"{significant(amount)} {unit}"
    return significant(value)


def bytes_text(value: float | None) -> str:
    """Return "1.5 MiB"."""
    if value is None or not math.isfinite(value):
        return MISSING
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(value) >= 1024**power:
            amount = value / 1024**power
            return f"{amount:,.0f} {unit}" if amount == round(amount) else f"{significant(amount)} {unit}"
    return f"{value:.0f} B"


def tokens_tick(value: float) -> str:
    """Return a context length for an axis: "512", "1k" (1,024), "1M"."""
    for limit, unit in ((1024**2, "M"), (1024, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.0f}"


def joined(items: list[str]) -> str:
    """Return "a, b and c"."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1] if items else ""


def rate_text(value: float | None) -> str:
    """Return a learning rate as people write it: "3e-4", "1.5e-3"."""
    if value is None or not math.isfinite(value) or value == 0:
        return MISSING if value != 0 else "0"
    exponent = math.floor(math.log10(abs(value)))
    return f"{value / 10**exponent:.3g}e{exponent}"
