"""Solve an architecture's width for the reference's number of parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from harness.config.build import build_model
from harness.config.schema import JobConfig

#: The relative difference in parameters that `match=parameters` must stay below.
MATCH_TOLERANCE = 0.02


def matched_model_config(config: JobConfig) -> tuple[dict[str, Any], float | None]:
    """Return the model's configuration after `match`, and the remaining relative mismatch in parameters
    against the reference (None for the reference itself, and with match=none).

    An architecture's `match` names the key whose value is solved (`d_ff` or `d_model`) and the step it moves
    in. An architecture without it, and a published model, are left as they are; `mismatch_text` says how far
    off they are.

    Raises ValueError where no value of the key comes within MATCH_TOLERANCE."""
    model_config, rule = dict(config.arch.model), config.arch.match
    if config.match == "none" or model_config == config.reference.model:
        return model_config, None
    target = build_model(config.reference.model, "meta").num_parameters
    if rule is None or is_published(config):
        return model_config, build_model(model_config, "meta").num_parameters / target - 1

    def count(value: int) -> int:
        return build_model({**model_config, rule.key: value}, "meta").num_parameters

    value = _nearest(count, target, rule.step, model_config[rule.key])
    mismatch = count(value) / target - 1
    if abs(mismatch) > MATCH_TOLERANCE:
        raise ValueError(
            f"match=parameters: {rule.key}={value} of arch={config.arch.name} is nearest to the "
            f"reference's {target} parameters and still {mismatch:+.1%} off; choose another size or "
            "match=none."
        )
    return {**model_config, rule.key: value}, mismatch


def is_published(config: JobConfig) -> bool:
    """Return whether the architecture's `published` names the size: it is that published model there, and no
    width of it is solved."""
    return config.size.name in config.arch.published


def mismatch_text(mismatch: float, *, is_published: bool = False) -> str:
    """Return the mismatch in words. Only a published model, or an architecture whose `match` is null, is
    beyond MATCH_TOLERANCE: Transformer², for example, has its experts beside the base's widths by design."""
    text = f"parameters {mismatch:+.2%} against the reference"
    if is_published:
        return f"{text}; published as it is, and nothing is matched."
    if abs(mismatch) <= MATCH_TOLERANCE:
        return f"{text}."
    return f"{text}; more than {MATCH_TOLERANCE:.0%}, and left so, for arch.match is null."


def _nearest(count: Callable[[int], int], target: int, step: int, start: int) -> int:
    """Return the multiple of `step` whose count is nearest to `target`. Counts grow with the value, nearly
    linearly, so that the chord between the bounds finds it in a few counts."""
    counts = functools.cache(count)
    low, high = step, max(step, start // step * step)
    while counts(high) < target:
        low, high = high, 2 * high
    while high - low > step:
        share = (target - counts(low)) / max(1, counts(high) - counts(low))
        chord = low + round(share * (high - low) / step) * step
        for value in (min(max(chord, low + step), high - step), chord + step, chord - step):
            if low < value < high:
                low, high = (value, high) if counts(value) < target else (low, value)
    return min((low, high), key=lambda value: abs(counts(value) - target))
