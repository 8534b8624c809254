"""Causal attention over a key-value cache, with grouped-query heads and an optional window."""

from __future__ import annotations

from torch import Tensor

from archs.ops.operation import Implementation, Operation

OPERATION = Operation(
    name="attention",
    implementations={
        "reference": Implementation(target="archs.ops.attention.reference:attention"),
        "plain": Implementation(target="archs.ops.attention.plain:attention"),
        "sdpa": Implementation(target="archs.ops.attention.sdpa:attention"),
        "flash_attn": Implementation(
            target="archs.ops.attention.flash_attn:attention",
            devices=("cuda",),
            requires="flash_attn",
            install_hint="pip install 'longarch[flash-attn]' on a machine with an NVIDIA GPU and nvcc",
        ),
    },
    auto={"cpu": ["sdpa"], "cuda": ["sdpa"]},
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
