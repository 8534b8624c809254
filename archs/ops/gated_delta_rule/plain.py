"""The gated delta rule in plain PyTorch: matrix products and one triangular solve inside a chunk, a short
recurrence between chunks (arXiv 2412.06464, section 3.3: the extended WY representation).

What token i adds to the state is u_i k_i', with u_i = beta_i (v_i - alpha_i S_{i-1} k_i). Unrolled from a
chunk's start, with g_i the sum of log alpha up to i, the rows u_i solve

    u_i + sum_{j<i} beta_i exp(g_i - g_j) (k_i . k_j) u_j = beta_i v_i - beta_i exp(g_i) S_0 k_i,

a unit triangular system whose inverse does not depend on the state, so that all chunks' are found at once.
Decays are kept as logarithms and only differences that are at most 0 are exponentiated: nothing overflows.

Chunks are handled in blocks, so that the (Q, Q) matrices alive stay within a fixed size; in training
a block's are recomputed in the backward pass where there is more than one. Inside, the state is (B, H, K,
V). Glossary in archs/ops/gated_delta_rule.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from archs.ops.precision import accumulation_dtype

# Elements of one kind of (Q, Q) matrix of one block: 16 MB in float32, and in training 64 MB, where a larger
# block saves recomputation.
BLOCK_ELEMENTS, TRAINING_BLOCK_ELEMENTS = 1 << 22, 1 << 24


def _block(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, state: Tensor, num_chunks: int
) -> tuple[Tensor, Tensor]:
    """`num_chunks` chunks of equal length: q, k (B, L, H, K) and the block's other inputs, state
    (B, H, K, V) -> o (B, L, H, V) and the state after."""
    # The chunk axis n, then heads, then the chunk's tokens.
    q, k, v, log_alpha, beta = (
        tensor.unflatten(1, (num_chunks, -1)).transpose(2, 3) for tensor in (q, k, v, log_alpha, beta)
    )
    elapsed = log_alpha.cumsum(-1)  # (B, n, H, Q), falling
    length, key_width, value_width = elapsed.shape[-1], k.shape[-1], v.shape[-1]
    is_future = torch.ones(length, length, dtype=torch.bool, device=k.device).triu_(1)
    decay = (elapsed[..., None] - elapsed[..., None, :]).masked_fill_(is_future, float("-inf")).exp_()
    scores = (q @ k.mT) * decay
    written = k * beta[..., None]
    system = (written @ k.mT) * decay  # its diagonal is taken as ones
    identity = torch.eye(length, dtype=k.dtype, device=k.device)
    inverse = torch.linalg.solve_triangular(system, identity, upper=False, unitriangular=True)
    since_start = elapsed.exp()[..., None]
    wanted = torch.cat((v * beta[..., None], written * since_start), dim=-1)
    values, erased = (inverse @ wanted).split((value_width, key_width), dim=-1)
    lookups = torch.cat((q * since_start, erased), dim=-2)  # (B, n, H, 2 Q, K)
    kept = (k * torch.exp(elapsed[..., -1:] - elapsed)[..., None]).mT
    chunk_decay = elapsed[..., -1].exp()[..., None, None]
    carried, added = [], []
    for n in range(num_chunks):
        from_state, held = (lookups[:, n] @ state).chunk(2, dim=-2)
        carried.append(from_state)
        added.append(values[:, n] - held)  # the rows u_i
        state = torch.addcmul(kept[:, n] @ added[-1], chunk_decay[:, n], state)
    o = torch.stack(carried, dim=1) + scores @ torch.stack(added, dim=1)
    return o.transpose(2, 3).flatten(1, 2), state


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
    """See archs.ops.gated_delta_rule.gated_delta_rule. A last, shorter chunk takes the tokens that are
    left over."""
    dtype = accumulation_dtype(v.dtype)
    inputs = [tensor.to(dtype) for tensor in (q, k, v, log_alpha, beta)]
    batch_size, num_tokens, num_heads, value_width = v.shape
    if initial_state is None:
        state = inputs[2].new_zeros(batch_size, num_heads, k.shape[-1], value_width)
    else:
        state = initial_state.to(dtype).mT
    num_whole = num_tokens // chunk_tokens
    is_training = torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, state))
    budget = TRAINING_BLOCK_ELEMENTS if is_training else BLOCK_ELEMENTS
    per_block = max(1, budget // (batch_size * num_heads * chunk_tokens**2))
    blocks = [
        (first * chunk_tokens, min(per_block, num_whole - first), chunk_tokens)
        for first in range(0, num_whole, per_block)
    ]
    if num_tokens > num_whole * chunk_tokens:
        blocks.append((num_whole * chunk_tokens, 1, num_tokens - num_whole * chunk_tokens))
    is_recomputed = is_training and len(blocks) > 1
    outputs = []
    with torch.autocast(v.device.type, enabled=False):  # the products keep the state's precision
        for first, num_chunks, length in blocks:
            tokens = slice(first, first + num_chunks * length)
            args = (*(tensor[:, tokens] for tensor in inputs), state, num_chunks)
            if is_recomputed:
                o, state = checkpoint(_block, *args, use_reentrant=False, preserve_rng_state=False)
            else:
                o, state = _block(*args)
            outputs.append(o)
    o = torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]
    return o.to(v.dtype), state.mT


def gated_delta_rule_step(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, state: Tensor
) -> Tensor:
    """See archs.ops.gated_delta_rule.gated_delta_rule_step. The state is read once, for the key and the
    query together: o = alpha S q + u (k . q)."""
    q, k, values, log_alpha, beta = (tensor.to(state.dtype) for tensor in (q, k, v, log_alpha, beta))
    alpha = log_alpha.exp()[..., None]
    held, read = (alpha[..., None] * (state @ torch.stack((k, q), dim=-1))).unbind(-1)
    added = beta[..., None] * (values - held)
    state.mul_(alpha[..., None]).addcmul_(added[..., :, None], k[..., None, :])
    return torch.addcmul(read, added, (k * q).sum(-1, keepdim=True)).to(v.dtype)
