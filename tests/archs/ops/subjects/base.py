"""What the tests need to know of an operation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

#: Kernels run on it at published widths; otherwise in the interpreter at small ones, since it is slow.
HAS_GPU = torch.cuda.is_available()
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes of a call, and constants of the code to replace so that small sizes take its long ways."""

    sizes: Mapping[str, Any]
    patches: Mapping[str, Any] = field(default_factory=dict)
    is_published_width: bool = False
    with_state: bool = True
    against: str = "reference"
    gradient_atol: float = 1e-10

    def __str__(self) -> str:
        texts = [f"{name}={value}" for name, value in self.sizes.items()]
        values = {n.rpartition(".")[2]: v if isinstance(v, int) else "" for n, v in self.patches.items()}
        texts += [f"{name}={value}" for name, value in values.items()]
        return " ".join(texts if self.with_state else [*texts, "no state"])


def parameters(cases: Sequence[Case]) -> list[Any]:
    """`cases` for pytest, those of published widths with their mark."""
    marks = pytest.mark.published_widths
    return [
        pytest.param(case, id=str(case), marks=marks if case.is_published_width else ()) for case in cases
    ]


class Maker:
    """Random float64 tensors, the same for the same sizes."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One operation as the tests see it.

    make:     sizes -> the inputs by name, float64, in the order of the call.
    call:     (inputs, implementation, sizes) -> y and the parts of the new state, in the order of `state`.
    tokens:   the inputs with an axis of tokens, axis 1.
    low:      the inputs that a model gives in its own dtype; the others stay in float32.
    state:    the inputs that the state consists of, the last ones.
    step:     (inputs of one token, state, implementation) -> y of the token; updates the state in place.
    plain:    cases for every implementation in PyTorch; values and gradients hold to `tolerance`.
    kernel:   cases for our Triton kernel, under `kernel_patches`.
    cuts:     sizes, and where to cut the call into several; kernel_cuts for the kernel, with gradients.
    steps:    sizes of a call to cut into single tokens, for `step`; kernel_steps for the kernel, without
              gradients and with `step` where there is one. `cuts` among the sizes cuts elsewhere.
    """

    make: Callable[..., Inputs]
    call: Callable[[Inputs, str, Mapping[str, Any]], list[Tensor]]
    tokens: Sequence[str]
    low: Sequence[str]
    state: Sequence[str] = ()
    step: Callable[[Inputs, str], Tensor] | None = None
    plain: Sequence[Case]
    kernel: Sequence[Case] = ()
    kernel_patches: Mapping[str, Any] = field(default_factory=dict)
    cuts: Sequence[tuple[Mapping[str, Any], Sequence[int]]] = ()
    kernel_cuts: Sequence[tuple[Mapping[str, Any], Sequence[int]]] = ()
    steps: Mapping[str, Any] | None = None
    kernel_steps: Sequence[Case] = ()
    tolerance: tuple[float, float] = (1e-10, 1e-10)  # relative, absolute
    is_differentiable: bool = True
    same_without_gradients: bool = False
    keeps_precision: bool = True

    def state_of(self, inputs: Inputs) -> list[str]:
        """The inputs that the state consists of; Titans' memory has a matrix per part and layer."""
        return [name for name in inputs if name.partition(":")[0] in self.state]

    def exact(self, inputs: Inputs) -> Inputs:
        """`inputs` on the CPU in float64."""
        return {name: tensor.detach().to("cpu", torch.float64) for name, tensor in inputs.items()}

    def cast(self, inputs: Inputs, device: torch.device, dtype: torch.dtype) -> Inputs:
        """`inputs` as a model gives them where it computes in `dtype`."""
        return {
            name: tensor.detach().to(device, dtype if name in self.low else torch.float32)
            for name, tensor in inputs.items()
        }


def cases(
    *, patches: Mapping[str, Any] | None = None, gradient_atol: float = 1e-10, **sizes: Sequence[Any]
) -> list[Case]:
    """Every combination of the sizes; `with_state` is one of them where given."""
    found = []
    for values in itertools.product(*sizes.values()):
        chosen = dict(zip(sizes, values, strict=True))
        with_state = chosen.pop("with_state", True)
        found.append(Case(chosen, patches or {}, with_state=with_state, gradient_atol=gradient_atol))
    return found


def published(*sizes: dict[str, Any], patches: Mapping[str, Any] | None = None) -> list[Case]:
    return [Case(size, patches or {}, is_published_width=True) for size in sizes]
