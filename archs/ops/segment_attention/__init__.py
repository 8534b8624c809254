"""Attention of a segment's tokens over its keys, of which each token may bring several."""

from __future__ import annotations

from torch import Tensor

from archs.ops.operation import Implementation, Operation

MODULE = "archs.ops.segment_attention"

OPERATION = Operation(
    name="segment_attention",
    implementations={
        name: Implementation(target=f"{MODULE}.{name}:segment_attention")
        for name in ("reference", "plain", "sdpa")
    },
    auto={"cpu": ["sdpa"], "cuda": ["sdpa"]},
)


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, *, implementation: str = "auto"
) -> Tensor:
    """softmax(q k' / sqrt(K)) v over the keys that `seen` names (Vaswani et al. 2017, eq. 1).

    q (B, C, H, K); k and v (B, S, H, K). seen (C, S) is True where the query may see the key, and None where
    every query sees every key; each query sees at least one. Titans MAC brings two keys per token, which the
    causal rule of archs.ops.attention cannot express. Returns (B, C, H, K).

    Raises ImplementationUnavailable where the implementation cannot run.
    """
    return OPERATION.function(implementation, q.device)(q, k, v, seen)
