"""One name, one colour, one marker and one line style an architecture, everywhere in a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib.colors import is_color_like, to_hex

from harness.record.schema import Header, Point

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*", "d")
LINE_STYLES = ("-", "--", ":", "-.")
#: For architectures whose records name no usable colour: Okabe and Ito's palette, which most
#: colour-blind readers can tell apart, then darker variants.
FALLBACK_COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000"),
    *("#004c77", "#8f3f00", "#00694d", "#8a4f70", "#6b6b6b", "#946600"),
)


@dataclass(frozen=True, kw_only=True)
class Series:
    """One (architecture, size) as it appears in every figure and table.

    The colour and marker belong to the architecture, the line style to the size."""

    arch: str
    size: str
    label: str
    colour: str
    marker: str
    line_style: str

    @property
    def key(self) -> tuple[str, str]:
        """(arch, size), which a table's rows are found by."""
        return (self.arch, self.size)


def make_series(points: Iterable[Point], headers: Mapping[str, Header]) -> list[Series]:
    """Names and colours come from the job's configuration, or from a point's own details where the
    job spans architectures; sizes appear in the name only if there are several. In the alphabetical
    order of the names."""
    points = [point for point in points if point.arch]
    looks: dict[str, dict[str, Any]] = {}
    for point in points:
        look = looks.setdefault(point.arch, {})
        header = headers.get(point.run_id)
        config = header.config.get("arch") if header else None
        if isinstance(config, dict) and config.get("name") == point.arch:
            look.update(_named(config))  # the architecture's own job decides
        for name, value in _named(point.details).items():
            look.setdefault(name, value)
    names = {arch: str(look.get("display_name", arch)) for arch, look in looks.items()}
    keys = list(dict.fromkeys((point.arch, point.size) for point in points))
    keys.sort(key=lambda key: (names[key[0]].lower(), key[0]))  # stable: sizes keep their order
    archs = list(dict.fromkeys(arch for arch, _ in keys))
    sizes = list(dict.fromkeys(size for _, size in keys))
    series = []
    for arch, size in keys:
        number = archs.index(arch)
        colour = looks[arch].get("colour", FALLBACK_COLOURS[number % len(FALLBACK_COLOURS)])
        series.append(
            Series(
                arch=arch,
                size=size,
                label=names[arch] if len(sizes) == 1 else f"{names[arch]} ({size})",
                colour=to_hex(colour),
                marker=MARKERS[number % len(MARKERS)],
                line_style=LINE_STYLES[sizes.index(size) % len(LINE_STYLES)],
            )
        )
    return series


def _named(source: Mapping[str, Any]) -> dict[str, Any]:
    """The usable display_name and colour of a configuration or of a point's details."""
    look = {}
    if source.get("display_name"):
        look["display_name"] = source["display_name"]
    if isinstance(source.get("colour"), str) and is_color_like(source["colour"]):
        look["colour"] = source["colour"]
    return look
