"""The static cost card of a configured model: parameters, state and FLOPs, without running it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from archs.base import Flops, SequenceModel
from harness.config.build import build_model
from harness.config.match import matched_model_config
from harness.config.schema import JobConfig
from harness.record.metrics import Metric

#: 1k to 1M tokens.
CONTEXT_LENGTHS_TOKENS = tuple(2**power for power in range(10, 21))

#: The numbers of a "cost" point. All but the first stand in its details, by context length.
METRICS = (
    Metric(
        name="num_parameters",
        label="parameters",
        unit="",
        direction="neither",
        kind="cost",
        tolerance=0,
        is_headline=True,
    ),
    Metric(name="state_bytes", label="state", unit="bytes", direction="lower", kind="cost", tolerance=0),
    *(
        Metric(
            name=f"{what}_flops_per_token",
            label=what,
            unit="FLOPs/token",
            direction="lower",
            kind="cost",
            tolerance=0,
        )
        for what in ("prefill", "decode", "dispatch")
    ),
)


def card(model: SequenceModel, dtype: str) -> dict[str, Any]:
    """Return num_parameters, dtype, and for batch 1 and each context length in tokens: state_bytes,
    prefill_flops_per_token and decode_flops_per_token.

    A model that has `dispatch_flops` (Transformer²) has dispatch_flops_per_token too, which is no part of the
    prefill. On the meta device this costs no memory."""
    lengths = CONTEXT_LENGTHS_TOKENS
    dispatch_flops: Callable[[int], Flops] | None = getattr(model, "dispatch_flops", None)
    values: dict[str, Any] = {
        "num_parameters": model.num_parameters,
        "dtype": dtype,
        "state_bytes": {str(n): model.state_bytes_at(1, n) for n in lengths},
        "prefill_flops_per_token": {str(n): model.flops(n, "prefill").total / n for n in lengths},
        "decode_flops_per_token": {str(n): model.flops(n, "decode").total for n in lengths},
    }
    if dispatch_flops is not None:
        values["dispatch_flops_per_token"] = {str(n): dispatch_flops(n).total / n for n in lengths}
    return values


def meta_model(config: JobConfig) -> tuple[SequenceModel, float | None]:
    """Return the configured model on the meta device in its dtype, and its parameter mismatch."""
    model_config, mismatch = matched_model_config(config)
    return build_model(model_config, "meta").to(getattr(torch, config.dtype)), mismatch
