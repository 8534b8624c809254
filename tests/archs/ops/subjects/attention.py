"""The attentions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from archs.ops.attention import attention, attention_step
from archs.ops.segment_attention import segment_attention
from tests.archs.ops.subjects.base import HAS_GPU, Case, Inputs, Maker, Subject


def _attention_inputs(
    *, queries: int, keys: int, batch: int = 2, heads: int = 4, kv_heads: int = 2, width: int = 8, **_: Any
) -> Inputs:
    make = Maker(0)
    shapes = ((batch, queries, heads, width), (batch, keys, kv_heads, width), (batch, keys, kv_heads, width))
    return {name: make.normal(*shape) for name, shape in zip("qkv", shapes, strict=True)}


def _attention(inputs: Inputs, implementation: str, sizes: Mapping[str, Any]) -> list[Tensor]:
    window_tokens, num_sink_tokens = sizes.get("window", (None, 0))
    options = dict(window_tokens=window_tokens, num_sink_tokens=num_sink_tokens)
    return [attention(*inputs.values(), **options, implementation=implementation)]


_PAIRS = [(1, 1), (1, 90), (63, 63), (64, 90), (65, 65), (129, 140), (150, 300)]
ATTENTION = Subject(
    make=_attention_inputs,
    call=_attention,
    tokens=(),
    low="qkv",
    plain=[
        Case(dict(queries=queries, keys=keys, window=window))
        for window in [(None, 0), (5, 0), (64, 4), (100, 3)]
        for queries, keys in _PAIRS
    ],
    tolerance=(0, 1e-12),
    keeps_precision=False,
)


def _step_inputs(
    *, slots: int, batch: int = 2, heads: int = 4, kv_heads: int = 2, width: int = 8, **_: Any
) -> Inputs:
    """A head's keys stand in one piece, as the attention mixer has them."""
    make = Maker(slots)
    k, v = (make.normal(batch, kv_heads, slots, width).transpose(1, 2) for _ in range(2))
    return {"q": 3 * make.normal(batch, heads, width), "k": k, "v": v}


def _step(inputs: Inputs, implementation: str, sizes: Mapping[str, Any]) -> list[Tensor]:
    num_seen = torch.tensor([sizes["seen"]], device=inputs["q"].device)
    k, v = (inputs[name].clone(memory_format=torch.preserve_format) for name in "kv")
    k[:, sizes["seen"] :], v[:, sizes["seen"] :] = sizes["unseen"], sizes["unseen"]
    return [attention_step(inputs["q"], k, v, num_seen, implementation=implementation)]


def _seen(slots: int) -> list[int]:
    """One key, less than a tile, whole tiles and parts of one, less than all slices, all keys."""
    return sorted({1, 7, 16, 17, slots // 2, slots - 1, slots} & set(range(1, slots + 1)))


_STEPS = [(2, 1, 1, 16, 1), (2, 2, 2, 24, 65), (1, 3, 1, 16, 131), (1, 8, 2, 64, 33)]
if HAS_GPU:
    _STEPS += [(2, 12, 12, 64, 4099), (1, 16, 4, 128, 20001), (3, 16, 1, 96, 515), (64, 4, 4, 64, 300)]
    _STEPS += [(1, 17, 1, 128, 1000)]
ATTENTION_STEP = Subject(
    make=_step_inputs,
    call=_step,
    tokens=(),
    low="qkv",
    plain=[Case(dict(slots=65, seen=seen, unseen=1e3)) for seen in (1, 2, 64, 65)],
    kernel=[
        Case(
            dict(
                batch=batch,
                heads=heads,
                kv_heads=kv_heads,
                width=width,
                slots=slots,
                seen=seen,
                unseen=float("nan"),
            )
        )
        for batch, heads, kv_heads, width, slots in _STEPS
        for seen in _seen(slots)
    ],
    kernel_patches={} if HAS_GPU else {"archs.ops.attention.kernel_step.TILE_BYTES": 1},
    tolerance=(0, 1e-12),
    is_differentiable=False,
    keeps_precision=False,
)


def _segment_inputs(*, queries: int, keys: int, **_: Any) -> Inputs:
    make = Maker(queries)
    shapes = ((2, queries, 3, 5), (2, keys, 3, 5), (2, keys, 3, 5))
    return {name: make.normal(*shape) for name, shape in zip("qkv", shapes, strict=True)}


def _segment(inputs: Inputs, implementation: str, sizes: Mapping[str, Any]) -> list[Tensor]:
    """Two keys per token, the first tokens persistent, or every key seen."""
    queries, keys = sizes["queries"], sizes["keys"]
    token = torch.arange(keys) // 2
    seen = token <= token[-2 * queries :: 2, None] if sizes["causal"] else None
    return [segment_attention(*inputs.values(), seen, implementation=implementation)]


SEGMENT_ATTENTION = Subject(
    make=_segment_inputs,
    call=_segment,
    tokens=(),
    low="qkv",
    plain=[
        Case(dict(queries=queries, keys=keys, causal=causal))
        for causal in (True, False)
        for queries, keys in [(1, 2), (1, 9), (7, 14), (17, 38), (63, 130)]
    ],
    tolerance=(0, 1e-12),
    keeps_precision=False,
)
