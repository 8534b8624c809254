"""The cross-entropy of a linear head, with a chunk of logits at most alive, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from archs.ops.precision import accumulation_dtype

#: The most tokens of a chunk, and the most logits: up to 8192 words of a vocabulary the first decides, beyond
#: the second, 256 MiB of float32.
MAX_CHUNK_TOKENS, MAX_CHUNK_LOGITS = 8192, 2**26


def chunked_cross_entropy(
    features: Tensor,
    head: nn.Module,
    targets: Tensor,
    weights: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Weighted mean cross-entropy in nats of head(features), a chunk of logits alive at a time.

    features (B, T, D), targets (B, T), weights (B, T) or None -> scalar. One chunk is a plain product and
    loss. Of several, a linear head without bias has its gradients computed in the forward pass, chunk by
    chunk (`LinearCrossEntropy`); of any other head a chunk's logits are computed again in the backward pass.
    chunk_tokens: default MAX_CHUNK_TOKENS, or fewer where the vocabulary is large.
    """
    flat, flat_targets = features.flatten(0, 1), targets.flatten()
    flat_weights = None if weights is None else weights.flatten()
    linear = head if isinstance(head, nn.Linear) and head.bias is None else None
    if chunk_tokens is None:
        vocab_size = 1 if linear is None else linear.out_features
        chunk_tokens = min(MAX_CHUNK_TOKENS, max(1, MAX_CHUNK_LOGITS // vocab_size))

    def chunk_loss(x: Tensor, y: Tensor, w: Tensor | None) -> Tensor:
        logits = head(x)
        nll = F.cross_entropy(logits.to(accumulation_dtype(logits.dtype)), y, reduction="none")
        return (nll if w is None else nll * w).sum()

    num_tokens = flat.shape[0]
    if linear is not None and num_tokens > chunk_tokens and torch.is_grad_enabled():
        total = LinearCrossEntropy.apply(flat, linear.weight, flat_targets, flat_weights, chunk_tokens)
    else:
        total = flat.new_zeros((), dtype=torch.promote_types(flat.dtype, torch.float32))
        for start in range(0, num_tokens, chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            args = (flat[chunk], flat_targets[chunk], None if flat_weights is None else flat_weights[chunk])
            if num_tokens <= chunk_tokens:
                total = total + chunk_loss(*args)
            else:
                total = total + checkpoint(chunk_loss, *args, use_reentrant=False)
    return total / (num_tokens if flat_weights is None else flat_weights.sum())


class LinearCrossEntropy(torch.autograd.Function):
    """x (N, D), weight (V, D), targets (N,), weights (N,) or None, tokens of a chunk -> the weighted sum of
    the cross-entropies of x weight', in nats.

    With p = softmax(x W'), the gradient of a token's logits is w (p - onehot), which is at hand once its loss
    is: so a chunk's share of dx and dW is computed then, and logits are neither kept nor computed again (the
    way of Liger Kernel, Hsu et al. 2024, arXiv 2410.10989, section 3.2). The backward pass only scales them.
    Products run in autocast's dtype, sums over chunks in float32 (float64 for float64). Differentiable once,
    in x and weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None, chunk_tokens: int
    ) -> Tensor:
        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        dtype = accumulation_dtype(x.dtype)
        dx = torch.empty_like(x) if needs_dx else None
        dw = torch.zeros_like(weight, dtype=dtype) if needs_dw else None
        total = x.new_zeros((), dtype=dtype)
        for start in range(0, x.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            some, target = x[chunk], targets[chunk, None]
            logits = F.linear(some, weight)
            operand = logits.dtype
            logits = logits.to(dtype)
            norm = logits.logsumexp(dim=-1, keepdim=True)
            nll = (norm - logits.gather(1, target))[:, 0]
            total += (nll if weights is None else nll * weights[chunk]).sum()
            if dx is None and dw is None:
                continue
            logits = logits.sub_(norm).exp_()  # p, and then the gradient
            logits.scatter_add_(1, target, logits.new_full((), -1.0).expand_as(target))
            if weights is not None:
                logits *= weights[chunk, None]
            logits = logits.to(operand)
            if dx is not None:
                dx[chunk] = logits @ weight.to(operand)
            if dw is not None:
                dw += logits.mT @ some.to(operand)
        ctx.save_for_backward(dx, dw)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        return (
            None if dx is None else dx * gradient.to(dx.dtype),
            None if dw is None else (dw * gradient).to(ctx.weight_dtype),
            *(None, None, None),
        )
