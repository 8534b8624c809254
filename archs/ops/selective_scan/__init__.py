"""Mamba's selective scan: a diagonal recurrence whose step size, input and output maps depend on the
token.

Glossary (the letters of arXiv 2312.00752, section 3):
    x   the sequence, E channels              A   (E, N) decay rates, negative
    dt  step size (the paper's Delta) > 0     B   input map, one a token, shared by the channels
    h   the state, (E, N) a sequence          C   output map, likewise          D   skip weight
"""

from __future__ import annotations

from torch import Tensor

from archs.ops.operation import Implementation, Operation, triton_kernel

_INSTALL_HINT = (
    "MAMBA_KEEP_CUDA_BUILD=TRUE pip install 'longarch[mamba-ssm]' --no-build-isolation on a machine with an "
    "NVIDIA GPU and nvcc (README, On a GPU)"
)


def _operation(name: str, function: str) -> Operation:
    module = "archs.ops.selective_scan"
    return Operation(
        name=name,
        implementations={
            "reference": Implementation(target=f"{module}.reference:{function}"),
            "plain": Implementation(target=f"{module}.plain:{function}"),
            "triton": triton_kernel(f"{module}.kernel:{function}"),
            "mamba_ssm": Implementation(
                target=f"{module}.mamba_ssm:{function}",
                devices=("cuda",),
                requires="mamba_ssm",
                install_hint=_INSTALL_HINT,
            ),
        },
        auto={"cpu": ["plain"], "cuda": ["plain"]},
    )


OPERATION = _operation("selective_scan", "selective_scan")
STEP_OPERATION = _operation("selective_step", "selective_step")


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None = None,
    *,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t; y_t = C_t h_t + D x_t (arXiv 2312.00752, algorithm 2).

    B is discretised as dt B, as in the published code, not by the zero-order hold of eq. 4.
    x, dt (B, T, E), dt after its softplus; A (E, N); B, C (B, T, N); D (E,); initial_state (B, E, N),
    zeros where None. Returns y (B, T, E) in the dtype of x and the final state (B, E, N) in
    float32, or float64 for a float64 x.

    Raises ImplementationUnavailable where the implementation cannot run.
    """
    function = OPERATION.function(implementation, x.device)
    return function(x, dt, A, B, C, D, initial_state)


def selective_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    *,
    implementation: str = "auto",
) -> Tensor:
    """One token of `selective_scan`: x, dt (B, E), B, C (B, N) -> y (B, E). Updates state (B, E, N) in
    place; not differentiable."""
    function = STEP_OPERATION.function(implementation, x.device)
    return function(x, dt, A, B, C, D, state)
