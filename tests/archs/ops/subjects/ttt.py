"""Layers that train an inner model on their input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from archs.ops.ttt_linear import TTTLinearWeights, ttt_linear
from archs.ops.ttt_mlp import TTTMLPWeights, ttt_mlp
from tests.archs.ops.subjects.base import HAS_GPU, Case, Inputs, Maker, Subject, published

_TTT_NAMES = ("q", "k", "v", "lr", "token_scale", "ln_weight", "ln_bias")
GROUPS = "archs.ops.ttt_linear.plain.GROUP_MINI_BATCHES"


def _ttt_inputs(
    make: Maker, *, tokens: int, batch: int, heads: int, width: int, mini_batch: int
) -> dict[str, Tensor]:
    values = [
        *(make.normal(batch, tokens, heads, width) for _ in range(3)),
        make.normal(batch, tokens, heads).sigmoid() / width,
        1 / torch.arange(1, mini_batch + 1) + 0.1 * make.normal(mini_batch) / mini_batch,
        1 + 0.2 * make.normal(heads, width),
        0.2 * make.normal(heads, width),
    ]
    return dict(zip(_TTT_NAMES, values, strict=True))


def _ttt_linear_inputs(
    *,
    tokens: int,
    position: int = 0,
    batch: int = 2,
    heads: int = 2,
    width: int = 4,
    mini_batch: int = 16,
    **_: Any,
) -> Inputs:
    make = Maker(tokens + width)
    inputs = _ttt_inputs(make, tokens=tokens, batch=batch, heads=heads, width=width, mini_batch=mini_batch)
    weight, gradient = (make.normal(batch, heads, width + 1, width) for _ in range(2))
    return inputs | {"weight": weight / width**0.5, "gradient": 0.1 * gradient * bool(position)}


def _ttt_linear(inputs: Inputs, implementation: str, sizes: Mapping[str, Any]) -> list[Tensor]:
    values = list(inputs.values())
    state, position = TTTLinearWeights(*values[7:]), sizes.get("position", 0)
    y, new = ttt_linear(*values[:7], state, position, implementation=implementation)
    return [y, *new]


def _ttt_mlp_inputs(
    *,
    tokens: int,
    position: int = 0,
    batch: int = 2,
    heads: int = 2,
    width: int = 4,
    mini_batch: int = 16,
    **_: Any,
) -> Inputs:
    make = Maker(tokens + width)
    inputs = _ttt_inputs(make, tokens=tokens, batch=batch, heads=heads, width=width, mini_batch=mini_batch)
    shapes = ((batch, heads, width + 1, 4 * width), (batch, heads, 4 * width + 1, width))
    weights = [make.normal(*shape) / (shape[2] - 1) ** 0.5 for shape in shapes]
    gradients = [0.1 * make.normal(*shape) * bool(position) for shape in shapes]
    return inputs | dict(zip(TTTMLPWeights._fields, (*weights, *gradients), strict=True))


def _ttt_mlp(inputs: Inputs, implementation: str, sizes: Mapping[str, Any]) -> list[Tensor]:
    values = list(inputs.values())
    state, position = TTTMLPWeights(*values[7:]), sizes.get("position", 0)
    y, new = ttt_mlp(*values[:7], state, position, implementation=implementation)
    return [y, *new]


_TTT_PLAIN = [
    *(
        Case(dict(tokens=tokens, position=position))
        for tokens, position in [(1, 0), (5, 0), (15, 0), (16, 0), (17, 0), (32, 0), (65, 0), (1, 15), (3, 4)]
    ),
    *(Case(dict(tokens=tokens, position=5)) for tokens in (11, 29, 30)),
    Case(dict(tokens=9, mini_batch=1)),  # online gradient descent
    Case(dict(tokens=70, position=10), {GROUPS: 2}),
    Case(dict(tokens=150, position=10), {GROUPS: 1}),  # without gradients 9 mini-batches in groups of 4
]
_TTT_CUTS = [
    (dict(tokens=40), (7,)),
    (dict(tokens=40), (16, 27)),
    (dict(tokens=10, mini_batch=4), range(1, 10)),
]


def _linear(tokens: int, position: int, width: int, mini_batch: int = 16, **more: int) -> dict[str, Any]:
    sizes = dict(tokens=tokens, position=position, width=width, mini_batch=mini_batch, batch=1)
    return sizes | more


_PUBLISHED = (64, 96, 128)
_WIDTHS = _PUBLISHED if HAS_GPU else (16, 24)  # the interpreter is slow
_CHECKPOINTS = {"archs.ops.ttt_linear.kernel.checkpoint_mini_batches": lambda _: 2}
TTT_LINEAR = Subject(
    make=_ttt_linear_inputs,
    call=_ttt_linear,
    tokens=_TTT_NAMES[:4],
    low=_TTT_NAMES[:4],
    state=TTTLinearWeights._fields,
    plain=_TTT_PLAIN,
    kernel=[
        # One token; a mini-batch less one; whole ones; several and a part; from inside one: to its end, not
        # to its end, past it.
        *(
            Case(_linear(tokens, position, _WIDTHS[0], heads=2))
            for tokens, position in [(1, 0), (15, 0), (16, 0), (37, 0), (3, 13), (4, 5), (29, 5)]
        ),
        *(Case(_linear(*sizes, width, heads=2)) for width in _WIDTHS[1:] for sizes in [(37, 0), (29, 5)]),
        # Mini-batches under a block of rows; over one; several blocks, also begun inside a later one.
        *(
            Case(_linear(tokens, position, _WIDTHS[0], mini_batch, heads=1))
            for mini_batch, tokens, position in [
                (1, 5, 0),
                (4, 11, 2),
                (17, 20, 0),
                (24, 30, 20),
                (64, 70, 40),
            ]
        ),
        # Weights computed again from stored ones: three groups of mini-batches, the last one short.
        *(
            Case(_linear(4 * mini_batch + 5, position, _WIDTHS[0], mini_batch, heads=1), _CHECKPOINTS)
            for mini_batch, position in [(8, 3), (8, 0), (20, 9)]
        ),
        Case(_linear(2000 if HAS_GPU else 40, 0, _WIDTHS[0], batch=2, heads=2), against="plain"),
        *published(*(_linear(19, 5, width, heads=2) for width in _PUBLISHED)),
    ],
    cuts=_TTT_CUTS,
    kernel_cuts=[(_linear(40, 0, _WIDTHS[0], heads=1), (cut,)) for cut in (7, 16, 27)],
    kernel_steps=[
        *(Case(_linear(10, 0, width, 4, heads=2)) for width in _WIDTHS if width not in _PUBLISHED),
        *published(*(_linear(10, 0, width, 4, heads=2) for width in _PUBLISHED)),
    ],
    tolerance=(1e-9, 1e-11),
)


def _mlp(batch: int, tokens: int, heads: int, width: int, mini_batch: int, position: int) -> dict[str, Any]:
    names = ("batch", "tokens", "heads", "width", "mini_batch", "position")
    return dict(zip(names, (batch, tokens, heads, width, mini_batch, position), strict=True))


TTT_MLP = Subject(
    make=_ttt_mlp_inputs,
    call=_ttt_mlp,
    tokens=_TTT_NAMES[:4],
    low=_TTT_NAMES,
    state=TTTMLPWeights._fields,
    same_without_gradients=True,
    plain=_TTT_PLAIN,
    kernel=[
        Case(_mlp(1, 1, 1, 16, 16, 0)),
        Case(_mlp(1, 1, 2, 24, 16, 15)),  # one token closes the mini-batch
        Case(_mlp(2, 5, 1, 16, 10, 3)),  # inside a mini-batch of no power of two
        Case(_mlp(1, 38, 1, 24, 16, 5)),  # two groups of mini-batches, both ends open
        Case(_mlp(1, 32, 2, 16, 16, 0)),
        Case(_mlp(1, 48, 1, 16, 40, 35)),  # mini-batches longer than a chunk
        Case(_mlp(1, 3, 1, 16, 1, 0)),  # online gradient descent
        *published(*(_mlp(1, 19, 1, width, 16, 5) for width in _PUBLISHED)),
        *(
            Case(_mlp(2, 200, 3, width, mini_batch, 7), against="plain")
            for width in (_PUBLISHED if HAS_GPU else ())
            for mini_batch in (16, 64)
        ),
    ],
    cuts=_TTT_CUTS,
    kernel_cuts=[(_mlp(1, 26, 1, 16, 16, 14), (17,)), (_mlp(1, 26, 1, 16, 16, 14), (1, 2))],
    kernel_steps=[
        Case(_mlp(2, 5, 1, 16, 3, 2)),  # across the ends of two mini-batches
        Case(_mlp(1, 1, 2, 16, 16, 0)),
        Case(_mlp(2, 1, 2, 24, 16, 7)),  # three blocks of hidden columns
        Case(_mlp(1, 1, 2, 24, 16, 15)),
        Case(_mlp(1, 1, 3, 12, 4, 2)),  # the last block is not full
        Case(_mlp(2, 1, 1, 16, 10, 4)),
        Case(_mlp(1, 1, 1, 16, 10, 9)),
        Case(_mlp(1, 1, 2, 16, 1, 0)),  # every token closes its mini-batch
        *published(_mlp(1, 1, 1, 64, 16, 3), _mlp(1, 1, 1, 96, 16, 15), _mlp(1, 1, 1, 128, 16, 3)),
    ],
    tolerance=(1e-9, 1e-11),
)
