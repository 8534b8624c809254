"""Recurrences with a matrix as their state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from archs.ops.gated_delta_rule import gated_delta_rule, gated_delta_rule_step
from archs.ops.selective_scan import selective_scan, selective_step
from archs.ops.ssd import ssd, ssd_step
from tests.archs.ops.subjects.base import HAS_GPU, Case, Inputs, Maker, Subject, cases, published

SCAN_KERNEL = "archs.ops.selective_scan.kernel"


def _scan_inputs(
    *, tokens: int, batch: int = 2, channels: int = 5, state: int = 3, step: float = 0.1, **_: Any
) -> Inputs:
    make = Maker(tokens)
    return {
        "x": make.normal(batch, tokens, channels),
        "dt": step * make.uniform(batch, tokens, channels),
        "A": -torch.arange(1, state + 1) * (0.5 + make.uniform(channels, state)),
        "B": make.normal(batch, tokens, state),
        "C": make.normal(batch, tokens, state),
        "D": make.normal(channels),
        "initial_state": make.normal(batch, channels, state),
    }


def _scan(inputs: Inputs, implementation: str, sizes: Mapping[str, Any]) -> list[Tensor]:
    return list(selective_scan(*inputs.values(), implementation=implementation))


_SCANS = [(1, 1, 3, 2), (2, 8, 4, 2), (1, 19, 6, 3), (1, 9, 3, 16)]
if HAS_GPU:
    _SCANS += [(2, 63, 24, 16), (1, 300, 96, 16), (1, 1025, 128, 24), (2, 65, 64, 128)]
SELECTIVE_SCAN = Subject(
    make=_scan_inputs,
    call=_scan,
    tokens=("x", "dt", "B", "C"),
    low=("x", "B", "C"),
    state=("initial_state",),
    step=lambda inputs, implementation: selective_step(*inputs.values(), implementation=implementation),
    plain=cases(tokens=[1, 2, 63, 64, 65, 130], step=[0.1, 1000.0], with_state=[True, False]),
    kernel=[
        *(Case(dict(batch=b, tokens=t, channels=e, state=n)) for b, t, e, n in _SCANS),
        Case(dict(batch=1, tokens=11, channels=4, state=2, step=1000.0), with_state=False),
    ],
    kernel_patches={} if HAS_GPU else {f"{SCAN_KERNEL}.CHUNK_TOKENS": 8, f"{SCAN_KERNEL}.BLOCK_CHANNELS": 4},
    cuts=[(dict(tokens=70), (1, 66))],
    kernel_cuts=[
        (dict(batch=1, tokens=17, channels=4, state=2), (3,)),
        (dict(batch=1, tokens=17, channels=4, state=2), (9,)),
    ],
    steps=dict(tokens=9),
    kernel_steps=[Case(dict(tokens=3, channels=70, state=3)), Case(dict(tokens=3, channels=70, state=16))],
)

SSD_KERNEL = "archs.ops.ssd.kernel"
SSD_PLAIN = "archs.ops.ssd.plain"


def _ssd_inputs(
    *,
    tokens: int,
    batch: int = 2,
    heads: int = 4,
    width: int = 3,
    groups: int = 2,
    state: int = 5,
    step: float = 0.1,
    **_: Any,
) -> Inputs:
    make = Maker(tokens)
    return {
        "x": make.normal(batch, tokens, heads, width),
        "dt": step * make.uniform(batch, tokens, heads),
        "A": -torch.arange(1, heads + 1, dtype=torch.float64),
        "B": make.normal(batch, tokens, groups, state),
        "C": make.normal(batch, tokens, groups, state),
        "D": make.normal(heads),
        "initial_state": make.normal(batch, heads, width, state),
    }


def _ssd(inputs: Inputs, implementation: str, sizes: Mapping[str, Any]) -> list[Tensor]:
    chunk_tokens = sizes.get("chunk", 16)
    return list(ssd(*inputs.values(), chunk_tokens=chunk_tokens, implementation=implementation))


def _ssd_case(*sizes: int, **more: Any) -> dict[str, Any]:
    names = ("batch", "tokens", "heads", "width", "groups", "state", "chunk")
    return dict(zip(names, sizes, strict=True)) | more


_SSDS = [(1, 1, 2, 16, 1, 16, 16), (2, 21, 1, 24, 1, 16, 16), (1, 39, 2, 16, 2, 20, 32)]
if HAS_GPU:
    _SSDS += [(2, 63, 4, 64, 1, 128, 256), (1, 300, 4, 96, 2, 64, 128)]
    _SSDS += [(1, 1025, 2, 128, 1, 128, 256), (2, 257, 3, 24, 3, 96, 64)]
_BLOCKS = f"{SSD_PLAIN}.TRAINING_BLOCK_ELEMENTS"


def _tiles_of_16() -> dict[str, Any]:
    """In the interpreter, small sizes take several tiles of each kind."""
    if HAS_GPU:
        return {}
    language = pytest.importorskip("triton.language")
    return {f"{SSD_KERNEL}.MAX_TILE": {language.float32: 16}}


SSD = Subject(
    make=_ssd_inputs,
    call=_ssd,
    tokens=("x", "dt", "B", "C"),
    low=("x", "B", "C"),
    state=("initial_state",),
    step=lambda inputs, implementation: ssd_step(*inputs.values(), implementation=implementation),
    plain=[
        *cases(tokens=[1, 15, 16, 17, 63, 65], groups=[1, 2, 4], step=[0.1]),
        *cases(tokens=[1, 15, 16, 17, 63, 65], groups=[1, 2, 4], step=[1000.0], gradient_atol=1e-8),
        *cases(patches={_BLOCKS: 1}, tokens=[1, 16, 63, 65], with_state=[True, False]),
        *cases(patches={_BLOCKS: 1 << 22}, tokens=[1, 16, 63, 65], with_state=[True, False]),
    ],
    kernel=[
        *(Case(_ssd_case(*sizes), _tiles_of_16()) for sizes in _SSDS),
        Case(_ssd_case(1, 37, 1, 16, 1, 16, 32, step=1000.0), _tiles_of_16(), with_state=False),
        *published(_ssd_case(1, 35, 1, 64, 1, 128, 32), _ssd_case(1, 19, 1, 96, 1, 96, 16)),
        *published(_ssd_case(1, 19, 1, 128, 1, 64, 16)),
    ],
    kernel_patches=_tiles_of_16(),
    cuts=[(dict(tokens=70), (1, 66))],
    kernel_cuts=[(_ssd_case(1, 40, 1, 16, 1, 16, 32), (7,)), (_ssd_case(1, 40, 1, 16, 1, 16, 32), (33,))],
    steps=dict(tokens=9),
    kernel_steps=[
        Case(dict(tokens=3, width=24, state=20)),
        *published(*(dict(tokens=3, width=w, state=n) for w, n in ((64, 128), (96, 96), (128, 64)))),
    ],
    tolerance=(1e-10, 1e-9),
)

DELTA_PLAIN = "archs.ops.gated_delta_rule.plain"


def _delta_inputs(*, tokens: int, rate: float = 0.1, batch: int = 2, heads: int = 3, **_: Any) -> Inputs:
    """Unit keys of 5 channels and values of 7; log alpha in [-rate, 0), beta in [0, 1)."""
    make = Maker(tokens)
    q, k = (F.normalize(make.normal(batch, tokens, heads, 5), dim=-1) for _ in range(2))
    return {
        "q": q,
        "k": k,
        "v": make.normal(batch, tokens, heads, 7),
        "log_alpha": -rate * make.uniform(batch, tokens, heads),
        "beta": make.uniform(batch, tokens, heads),
        "initial_state": make.normal(batch, heads, 7, 5),
    }


def _delta(inputs: Inputs, implementation: str, sizes: Mapping[str, Any]) -> list[Tensor]:
    return list(gated_delta_rule(*inputs.values(), chunk_tokens=16, implementation=implementation))


_BLOCKS = f"{DELTA_PLAIN}.TRAINING_BLOCK_ELEMENTS"
GATED_DELTA_RULE = Subject(
    make=_delta_inputs,
    call=_delta,
    tokens=("q", "k", "v", "log_alpha", "beta"),
    low=("q", "k", "v", "log_alpha", "beta"),
    state=("initial_state",),
    step=lambda inputs, implementation: gated_delta_rule_step(
        *inputs.values(), implementation=implementation
    ),
    plain=[
        *cases(tokens=[1, 15, 16, 17, 63, 65], rate=[0.1, 1000.0], with_state=[True, False]),
        *cases(patches={_BLOCKS: 1}, tokens=[1, 16, 63, 65], with_state=[True, False]),
        *cases(patches={_BLOCKS: 1 << 22}, tokens=[1, 16, 63, 65], with_state=[True, False]),
    ],
    cuts=[(dict(tokens=70), (1, 66))],
    steps=dict(tokens=9),
    tolerance=(1e-10, 1e-9),
)
