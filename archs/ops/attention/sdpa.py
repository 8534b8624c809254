"""Attention through torch's scaled_dot_product_attention, which picks a fused kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention.bias import causal_lower_right

from archs.ops.attention.plain import visible

# A block of queries against a window keeps memory linear in the sequence. A block of B queries meets
# B + w - 1 keys, so one longer than the window computes mostly scores that the mask then drops.
SMALLEST_BLOCK_TOKENS, LARGEST_BLOCK_TOKENS = 64, 1024


def attention(q: Tensor, k: Tensor, v: Tensor, *, window_tokens: int | None, num_sink_tokens: int) -> Tensor:
    """See archs.ops.attention.attention."""
    num_queries, num_keys = q.shape[1], k.shape[1]
    # Under autocast a cache is wider than its query: rounded once here, and not again in every block.
    q, k, v = (t.transpose(1, 2).to(q.dtype) for t in (q, k, v))
    use_groups = q.shape[1] != k.shape[1]
    if window_tokens is None or window_tokens >= num_keys:
        if num_queries == num_keys or num_queries == 1:
            is_causal = num_queries > 1
            y = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=use_groups)
            return y.transpose(1, 2)
        # On a GPU in half precision. Elsewhere torch would make the mask of all queries and keys at once:
        # the blocks below make one of a block at a time, and skip the keys that come after it.
        if can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, use_groups)):
            return lower_right(q, k, v).transpose(1, 2)
        window_tokens = num_keys
    block_tokens = min(max(SMALLEST_BLOCK_TOKENS, window_tokens), LARGEST_BLOCK_TOKENS)
    outputs = []
    for start in range(0, num_queries, block_tokens):
        stop = min(start + block_tokens, num_queries)
        last = num_keys - num_queries + stop  # keys [first, last) and the sinks before them
        first = max(num_sink_tokens, last - (stop - start) - window_tokens + 1)
        sinks = min(num_sink_tokens, first)
        keys = torch.cat((k[:, :, :sinks], k[:, :, first:last]), dim=2) if sinks else k[:, :, first:last]
        values = torch.cat((v[:, :, :sinks], v[:, :, first:last]), dim=2) if sinks else v[:, :, first:last]
        mask = visible(
            stop - start, keys.shape[2], q.device, window_tokens=window_tokens, num_sink_tokens=sinks
        )
        outputs.append(
            F.scaled_dot_product_attention(
                q[:, :, start:stop], keys, values, attn_mask=mask, enable_gqa=use_groups
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


def lower_right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries that are the last C of S positions, q (B, H, C, K) on k and v (B, H', S, K) -> (B, H, C, K),
    without a mask where the flash kernel can run, which skips what no query sees."""
    # A bias of torch's is itself a tensor of the CPU, (2, C, S) floats that nothing reads: room of 16 GiB at
    # 16,384 queries and 131,072 keys. What is read are these two numbers.
    bias = causal_lower_right(1, 1)
    bias.seq_len_q, bias.seq_len_kv = q.shape[2], k.shape[2]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=q.shape[1] != k.shape[1])


def attention_step(q: Tensor, k: Tensor, v: Tensor, num_seen: Tensor) -> Tensor:
    """See archs.ops.attention.attention_step. Reads all S keys; a group's heads are the queries of its keys,
    so that no key is repeated."""
    grouped = q.unflatten(1, (k.shape[2], -1))
    seen = torch.arange(k.shape[1], device=q.device) < num_seen
    y = F.scaled_dot_product_attention(
        grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=seen.expand(grouped.shape[2], -1)
    )
    return y.flatten(1, 2)
