"""The gated delta rule as defined, one token at a time. Glossary in archs/ops/gated_delta_rule."""

from __future__ import annotations

import torch
from torch import Tensor

from archs.ops.precision import accumulation_dtype


def _update(k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, S: Tensor) -> Tensor:
    """k (B, H, K), v (B, H, V), log_alpha, beta (B, H), S (B, H, V, K) -> the new S."""
    alpha, beta = torch.exp(log_alpha)[..., None, None], beta[..., None, None]
    identity = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    erase = identity - beta * k[..., :, None] * k[..., None, :]
    return alpha * (S @ erase) + beta * v[..., :, None] * k[..., None, :]


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    *,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """See archs.ops.gated_delta_rule.gated_delta_rule; there are no chunks here."""
    del chunk_tokens
    dtype = accumulation_dtype(v.dtype)
    q, k, values, log_alpha, beta = (tensor.to(dtype) for tensor in (q, k, v, log_alpha, beta))
    if initial_state is None:
        S = values.new_zeros(v.shape[0], *v.shape[2:], k.shape[-1])
    else:
        S = initial_state.to(dtype)
    outputs = []
    for t in range(v.shape[1]):
        S = _update(k[:, t], values[:, t], log_alpha[:, t], beta[:, t], S)
        outputs.append((S @ q[:, t, :, :, None])[..., 0])
    return torch.stack(outputs, dim=1).to(v.dtype), S


def gated_delta_rule_step(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, state: Tensor
) -> Tensor:
    """See archs.ops.gated_delta_rule.gated_delta_rule_step."""
    q, k, values, log_alpha, beta = (tensor.to(state.dtype) for tensor in (q, k, v, log_alpha, beta))
    state.copy_(_update(k, values, log_alpha, beta, state))
    return (state @ q[..., None])[..., 0].to(v.dtype)
