"""Causal attention over a key-value cache, with grouped-query heads and an optional window."""

from __future__ import annotations

from torch import Tensor

from archs.ops.operation import Implementation, Operation, triton_kernel

MODULE = "archs.ops.attention"


def _operation(name: str, function: str, **more: Implementation) -> Operation:
    return Operation(
        name=name,
        implementations={
            "reference": Implementation(target=f"{MODULE}.reference:{function}"),
            "plain": Implementation(target=f"{MODULE}.plain:{function}"),
            "sdpa": Implementation(target=f"{MODULE}.sdpa:{function}"),
            "flash_attn": Implementation(
                target=f"{MODULE}.flash_attn:{function}",
                devices=("cuda",),
                requires="flash_attn",
                install_hint=(
                    "pip install 'longarch[flash-attn]' --no-build-isolation on a machine with an "
                    "NVIDIA GPU and nvcc (README, On a GPU)"
                ),
            ),
            **more,
        },
        auto={"cpu": ["sdpa"], "cuda": ["sdpa"]},
    )


OPERATION = _operation("attention", "attention")
STEP_OPERATION = _operation(
    "attention_step", "attention_step", triton=triton_kernel(f"{MODULE}.kernel_step:attention_step")
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_tokens: int | None = None,
    num_sink_tokens: int = 0,
    implementation: str = "auto",
) -> Tensor:
    """softmax(q k' / sqrt(K)) v over the keys each query may see (Vaswani et al. 2017, eq. 1).

    q (B, C, H, K) are the last C positions of the sequence whose keys k (B, S, H', K) and values
    v (B, S, H', K) are given, S >= C, H a multiple of H' (grouped-query heads). Query i sits at key
    position S - C + i and sees the keys up to itself; with `window_tokens` w only the last w of
    them, itself included. The first `num_sink_tokens` keys are seen by every query and stand
    outside the window (persistent tokens). Returns (B, C, H, K).

    Raises ImplementationUnavailable where the implementation cannot run.
    """
    function = OPERATION.function(implementation, q.device)
    return function(q, k, v, window_tokens=window_tokens, num_sink_tokens=num_sink_tokens)


def attention_step(
    q: Tensor, k: Tensor, v: Tensor, num_seen: Tensor, *, implementation: str = "auto"
) -> Tensor:
    """One query a sequence among the first `num_seen` keys of a cache: q (B, H, K), k and v (B, S, H', K),
    num_seen (1,) int64 on their device, 1 <= num_seen <= S -> (B, H, K). The host does not learn num_seen,
    so a CUDA graph that holds the call serves every length. Not differentiable.

    Raises ImplementationUnavailable where the implementation cannot run.
    """
    return STEP_OPERATION.function(implementation, q.device)(q, k, v, num_seen)
