"""State-space duality in plain PyTorch: matrix products inside chunks, a short recurrence between them
(arXiv 2405.21060, section 6 and listing 1).

Chunks are handled in blocks, so that the (Q, Q) matrices alive stay within a fixed size; in training
a block's are recomputed in the backward pass where there is more than one. Inside, the state is (B, G, N,
H/G P), so that the heads of a group share one product with B and one with C. Glossary in
archs/ops/ssd.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from archs.ops.precision import accumulation_dtype

# Elements of the (Q, Q) matrices of one block: 16 MB in float32, and in training 64 MB, where a larger
# block saves recomputation.
BLOCK_ELEMENTS, TRAINING_BLOCK_ELEMENTS = 1 << 22, 1 << 24


def _block(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, num_chunks: int
) -> tuple[Tensor, Tensor]:
    """`num_chunks` chunks of equal length: x (B, L, H, P) and the block's other inputs, state
    (B, G, N, H/G P) -> y without the skip, (B, L, H, P), and the state after."""
    num_groups, num_heads = B.shape[2], x.shape[2]
    # The chunk axis n, then heads or groups, then the chunk's tokens.
    x, dt, B, C = (
        tensor.unflatten(1, (num_chunks, -1)).transpose(2, 3) for tensor in (x * dt[..., None], dt, B, C)
    )
    elapsed = (dt * A[:, None]).cumsum(-1)  # (B, n, H, Q), falling
    length = elapsed.shape[-1]
    is_future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu_(1)
    decay = (elapsed[..., None] - elapsed[..., None, :]).masked_fill_(is_future, float("-inf")).exp_()

    def by_group(tensor: Tensor) -> Tensor:
        """(B, n, H, Q, P) -> (B, n, G, Q, H/G P): a group's heads side by side."""
        return tensor.unflatten(2, (num_groups, -1)).transpose(3, 4).flatten(4)

    scores = (C @ B.mT)[:, :, :, None] * decay.unflatten(2, (num_groups, -1))
    y = scores.flatten(2, 3) @ x
    to_end = torch.exp(elapsed[..., -1:] - elapsed)
    added = B.mT @ by_group(x * to_end[..., None])  # (B, n, G, N, H/G P)
    chunk_decay = elapsed[..., -1].exp().repeat_interleave(x.shape[-1], dim=-1)
    chunk_decay = chunk_decay.unflatten(-1, (num_groups, 1, -1))  # (B, n, G, 1, H/G P)
    starts = []
    for factor, term in zip(chunk_decay.unbind(1), added.unbind(1), strict=True):
        starts.append(state)
        state = torch.addcmul(term, factor, state)
    carried = C @ torch.stack(starts, dim=1)  # (B, n, G, Q, H/G P)
    carried = carried.unflatten(-1, (num_heads // num_groups, -1)).transpose(3, 4).flatten(2, 3)
    y = torch.addcmul(y, carried, elapsed.exp()[..., None])
    return y.transpose(2, 3).flatten(1, 2), state


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None,
    *,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """See archs.ops.ssd.ssd. A last, shorter chunk takes the tokens that are left over."""
    dtype = accumulation_dtype(x.dtype)
    inputs, dt, A, B, C, D = (tensor.to(dtype) for tensor in (x, dt, A, B, C, D))
    batch_size, num_tokens, num_heads, head_width = x.shape
    num_groups, state_width = B.shape[2:]
    group_width = num_heads // num_groups * head_width
    if initial_state is None:
        state = inputs.new_zeros(batch_size, num_groups, state_width, group_width)
    else:
        state = initial_state.to(dtype).reshape(batch_size, num_groups, group_width, state_width).mT
    num_whole = num_tokens // chunk_tokens
    is_training = torch.is_grad_enabled() and any(t.requires_grad for t in (inputs, dt, A, B, C, state))
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
    with torch.autocast(x.device.type, enabled=False):  # the products keep the state's precision
        for first, num_chunks, length in blocks:
            tokens = slice(first, first + num_chunks * length)
            args = (inputs[:, tokens], dt[:, tokens], A, B[:, tokens], C[:, tokens], state, num_chunks)
            if is_recomputed:
                y, state = checkpoint(_block, *args, use_reentrant=False, preserve_rng_state=False)
            else:
                y, state = _block(*args)
            outputs.append(y)
        y = torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]
        y = torch.addcmul(y, inputs, D[:, None])
    return y.to(x.dtype), state.mT.reshape(batch_size, num_heads, head_width, state_width)


def ssd_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> Tensor:
    """See archs.ops.ssd.ssd_step."""
    inputs, dt, A, B, C, D = (tensor.to(state.dtype) for tensor in (x, dt, A, B, C, D))
    num_groups = B.shape[1]
    grouped = state.unflatten(1, (num_groups, -1))  # (B, G, H/G, P, N), the same memory
    decay = torch.exp(dt * A).unflatten(1, (num_groups, -1))[..., None, None]
    added = (dt[:, :, None] * inputs).unflatten(1, (num_groups, -1))[..., None]
    grouped.mul_(decay).addcmul_(added, B[:, :, None, None])
    y = torch.matmul(grouped.flatten(2, 3), C[..., None])[..., 0].view(inputs.shape)
    return torch.addcmul(y, inputs, D[:, None]).to(x.dtype)
