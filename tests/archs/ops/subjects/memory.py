"""Titans' memory."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from archs.ops.neural_memory import NeuralMemoryState, neural_memory
from tests.archs.ops.subjects.base import HAS_GPU, Case, Inputs, Maker, Subject, cases, published

_PUBLISHED = (64, 96, 128)
MEMORY_KERNEL = "archs.ops.neural_memory.kernel"


def _memory_inputs(
    *,
    tokens: int,
    widths: Sequence[int],
    batch: int = 2,
    heads: int = 3,
    gates: float | None = None,
    fixed: Sequence[str] = ("decay", "momentum"),
    **_: Any,
) -> Inputs:
    """From a state that is not zero; every second token's gates in `fixed` have the value `gates`.

    With steps of 1 as well, a long sequence leaves every finite number."""
    make = Maker(tokens + len(widths))
    shape = (batch, tokens, heads)
    inputs = {
        "q": F.normalize(make.normal(*shape, widths[0]), dim=-1),
        "k": F.normalize(make.normal(*shape, widths[0]), dim=-1),
        "v": make.normal(*shape, widths[-1]),
        "decay": 0.5 * make.normal(*shape).sigmoid(),
        "step_size": 0.1 * make.normal(*shape).sigmoid(),
        "momentum": 0.75 * make.normal(*shape).sigmoid(),
    }
    if gates is not None:
        for name in fixed:
            inputs[name][:, ::2] = gates
    for part, scale in (("start", 1.0), ("weights", 1.0), ("update", 0.3)):
        for layer, pair in enumerate(itertools.pairwise(widths)):
            inputs[f"{part}:{layer}"] = make.normal(batch, heads, *pair) * (scale / pair[0] ** 0.5)
    return inputs


def _memory(inputs: Inputs, implementation: str, sizes: Mapping[str, Any]) -> list[Tensor]:
    values = list(inputs.values())
    depth = (len(values) - 6) // 3
    state = NeuralMemoryState(*(tuple(values[6 + i * depth : 6 + (i + 1) * depth]) for i in range(3)))
    options = dict(chunk_tokens=sizes["mini_batch"], implementation=implementation)
    y, new = neural_memory(*values[:6], state, sizes.get("position", 0), **options)
    return [y, *itertools.chain(*new)]


def _memory_case(
    widths: Sequence[int], mini_batch: int, position: int, tokens: int, heads: int, **more: Any
) -> dict[str, Any]:
    sizes = dict(widths=tuple(widths), mini_batch=mini_batch, position=position, tokens=tokens, heads=heads)
    return sizes | {"batch": 1} | more


_MEMORIES = [
    ((16, 16), 4, 0, 1, 1),
    ((24, 20), 5, 0, 7, 1),
    ((16, 16, 16), 8, 3, 2, 1),
    ((16, 32, 16), 4, 3, 5, 2),
    ((16, 24, 20), 17, 0, 19, 1),
    ((16, 24, 24, 16), 3, 2, 4, 1),
    ((16, 16, 16, 16, 16), 3, 0, 3, 1),
]
if HAS_GPU:
    _MEMORIES += [((64, 256, 64), 16, 5, 203, 3), ((64, 64), 16, 0, 160, 3), ((64, 128, 64), 64, 0, 200, 3)]
    _MEMORIES += [((64, 128, 128, 128, 64), 16, 0, 65, 2), ((96, 192, 96), 16, 1, 130, 2)]
    _MEMORIES += [((128, 256, 128), 16, 0, 127, 2)]
_DEPTHS = [(4, *[6] * hidden, 4) for hidden in range(4)]
NEURAL_MEMORY = Subject(
    make=_memory_inputs,
    call=_memory,
    tokens=("q", "k", "v", "decay", "step_size", "momentum"),
    low=("q", "k", "v", "decay", "step_size", "momentum"),
    state=("start", "weights", "update"),
    plain=[
        *cases(tokens=[11, 21], widths=_DEPTHS, mini_batch=[1, 3, 8, 64]),
        *cases(tokens=[21], widths=_DEPTHS, mini_batch=[1, 3, 8, 64], gates=[0.0, 1.0]),
        *cases(tokens=[11], widths=_DEPTHS[:2], mini_batch=[8], position=[3, 7]),
        Case(
            dict(tokens=21, widths=(4, 6, 4), mini_batch=4),
            {"archs.ops.neural_memory.plain.CHECKPOINT_CHUNKS": 2},
        ),
    ],
    kernel=[
        *(Case(_memory_case(*sizes)) for sizes in _MEMORIES),
        Case(
            _memory_case((16, 16, 16), 2, 1, 5, 1),
            {f"{MEMORY_KERNEL}.checkpoint_chunks_of": lambda num_chunks: 2},
        ),
        *(
            Case(_memory_case((16, 16), 4, 0, 5, 1, gates=value, fixed=("decay", "step_size", "momentum")))
            for value in (0.0, 1.0)
        ),
        *published(*(_memory_case((w, 2 * w, w), 16, 5, 19, 1) for w in _PUBLISHED)),
    ],
    cuts=[
        (dict(tokens=21, widths=(4, 6, 4), mini_batch=8), cuts)
        for cuts in (range(1, 21), (5, 6), (8, 16), (3, 16), (2, 4))
    ],
    kernel_cuts=[(_memory_case((16, 16), 3, 0, 5, 1), (2,))],
    kernel_steps=[  # whole walks, walks that start and end inside a chunk, and single tokens
        Case(_memory_case((16, 16), 3, 0, 7, 2, batch=2, cuts=(4, 5, 6))),
        Case(_memory_case((24, 40, 24), 3, 0, 7, 1, batch=2, cuts=(4, 5, 6))),
        Case(_memory_case((16,) * 5, 3, 0, 7, 1, batch=2, cuts=(4, 5, 6))),
        *published(*(_memory_case((w, 2 * w, w), 3, 0, 4, 1) for w in _PUBLISHED)),
    ],
    tolerance=(1e-10, 1e-10),
)
