"""Mamba-2's state-space duality: a selective scan whose decay is one number a head and token, so that
a chunk is a masked matrix product.

Glossary (the letters of arXiv 2405.21060):
    x   the sequence, H heads of P channels       A   (H,) decay rates, negative
    dt  step size > 0, one a head and token       B   input map, shared by the heads of a group
    h   the state, (P, N) a head                  C   output map, likewise     D   skip weight
    G   groups of heads that share B and C        Q   tokens of a chunk
"""

from __future__ import annotations

from torch import Tensor

from archs.ops.operation import Implementation, Operation, triton_kernel


def _operation(name: str, function: str) -> Operation:
    module = "archs.ops.ssd"
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
                install_hint=(
                    "pip install 'longarch[mamba-ssm]' --no-build-isolation on a machine with an "
                    "NVIDIA GPU and nvcc (README, On a GPU)"
                ),
            ),
        },
        auto={"cpu": ["plain"], "cuda": ["plain"]},
    )


OPERATION = _operation("ssd", "ssd")
STEP_OPERATION = _operation("ssd_step", "ssd_step")


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None = None,
    *,
    chunk_tokens: int = 256,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t'; y_t = h_t C_t + D x_t (arXiv 2405.21060, section 6).

    x (B, T, H, P); dt (B, T, H), after its softplus; A, D (H,); B, C (B, T, G, N), H a multiple of
    G; initial_state (B, H, P, N), zeros where None. T need not be a multiple of `chunk_tokens`,
    which changes the cost and not the result. Returns y (B, T, H, P) in the dtype of x and the final state
    (B, H, P, N) in float32, or float64 for a float64 x.

    Raises ImplementationUnavailable where the implementation cannot run.
    """
    function = OPERATION.function(implementation, x.device)
    return function(x, dt, A, B, C, D, initial_state, chunk_tokens=chunk_tokens)


def ssd_step(
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
    """One token of `ssd`: x (B, H, P), dt (B, H), B, C (B, G, N) -> y (B, H, P). Updates state
    (B, H, P, N) in place; not differentiable."""
    function = STEP_OPERATION.function(implementation, x.device)
    return function(x, dt, A, B, C, D, state)
