"""The gated delta rule: a matrix memory that decays and, at each token, replaces what it holds under
the token's key by the token's value.

Glossary (the letters of arXiv 2412.06464):
    q, k   query and key, H heads of K channels     v     value, H heads of V channels
    alpha  decay in (0, 1], one a head and token    beta  writing strength in [0, 1], likewise
    S      the state, (V, K) a head                 Q     tokens of a chunk (the paper's C)
"""

from __future__ import annotations

from torch import Tensor

from archs.ops.operation import Implementation, Operation


def _operation(name: str, function: str) -> Operation:
    module = "archs.ops.gated_delta_rule"
    return Operation(
        name=name,
        implementations={
            "reference": Implementation(target=f"{module}.reference:{function}"),
            "plain": Implementation(target=f"{module}.plain:{function}"),
        },
        auto={"cpu": ["plain"], "cuda": ["plain"]},
    )


OPERATION = _operation("gated_delta_rule", "gated_delta_rule")
STEP_OPERATION = _operation("gated_delta_rule_step", "gated_delta_rule_step")


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    *,
    chunk_tokens: int = 64,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """S_t = alpha_t S_{t-1} (I - beta_t k_t k_t') + beta_t v_t k_t'; o_t = S_t q_t (arXiv 2412.06464,
    eq. 10).

    q, k (B, T, H, K); v (B, T, H, V); log_alpha (B, T, H), at most 0; beta (B, T, H); initial_state
    (B, H, V, K), zeros where None. Keys of at most unit length keep S bounded; they are taken as they
    are given. T need not be a multiple of `chunk_tokens`, which changes the cost and not the result.
    Returns o (B, T, H, V) in the dtype of v and the final state (B, H, V, K) in float32, or float64 for a
    float64 v.

    Raises ImplementationUnavailable where the implementation cannot run.
    """
    function = OPERATION.function(implementation, v.device)
    return function(q, k, v, log_alpha, beta, initial_state, chunk_tokens=chunk_tokens)


def gated_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    implementation: str = "auto",
) -> Tensor:
    """One token of `gated_delta_rule`: q, k (B, H, K), v (B, H, V), log_alpha, beta (B, H) -> o
    (B, H, V). Updates state (B, H, V, K) in place; not differentiable."""
    function = STEP_OPERATION.function(implementation, v.device)
    return function(q, k, v, log_alpha, beta, state)
