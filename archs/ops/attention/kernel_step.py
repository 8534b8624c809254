"""One query a sequence against a cache of keys, in Triton: the keys are cut into slices that are read side by
side, and their softmaxes joined (the idea of Flash-Decoding, Dao et al. 2023,
pytorch.org/blog/flash-decoding).

Two kernels. The first has a program for each slice of each head of keys: it reads the slice's keys and values
once, for all query heads of the group, with the running maximum and sum of an online softmax (Milakov and
Gimelshein 2018, arXiv 1805.02867), and leaves the mean of the slice's values and the logarithm of its sum of
weights. The second joins the slices of a query head by these. Slices are cut on the device out of the keys
that are seen: the work follows num_seen and not the room of the cache, while the number of slices, which
the host launches, is fixed by the shapes and the card. So one CUDA graph serves every length, and slices
without a key end at once. Sums have a fixed order: two runs agree to the bit.

The bound is one read of the keys and values that are seen. The products run on tiles of keys, with the
group's query heads as rows, padded to the 16 that tensor cores multiply at a time: these have nothing else
to do in this step, and one code serves groups of one head and of many. All sums are float32; in half
precision the weights are rounded to it before they meet the values, as in fused kernels.

Glossary: B batch, H query heads, H' heads of keys and values, G = H / H' query heads of a group, K head
width, S slots of the cache.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from archs.ops.operation import ImplementationUnavailable

TILE_BYTES = 8192  # of keys, and of values as many; a program holds two of each, 37 KiB in all
SMALLEST_TILE_TOKENS, LARGEST_TILE_TOKENS = 16, 128  # of a product; registers for a group's scores
NUM_WARPS, NUM_STAGES = 4, 3  # the next tiles are on their way while one is multiplied
PROGRAMS_PER_PROCESSOR = 4  # that run at once: with more, slices get short; no card has timed it
INTERPRETED_PROCESSORS = 2  # where there is no card to ask
JOINED_SLICES = 32  # of a tile of the second kernel


@triton.jit
def _slice_kernel(
    q_ptr, k_ptr, v_ptr, num_seen_ptr, means_ptr, logs_ptr, scale,
    k_batch, k_token, k_head, v_batch, v_token, v_head,
    G: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """q (B, H, K), k and v (B, S, H', K) by their strides -> means (B, H, slices, K) of the values that a
    slice's keys weigh, and logs (B, H, slices), the base-2 logarithm of the sum of their weights: -inf, and
    no mean, where a slice has no key. `scale` is of scores in base 2."""
    index, num_slices = tl.program_id(0), tl.num_programs(0)
    kv_head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    num_seen = tl.load(num_seen_ptr).to(tl.int32)
    num_tiles = tl.cdiv(num_seen, TILE)
    first = index * num_tiles // num_slices * TILE
    stop = tl.minimum((index + 1) * num_tiles // num_slices * TILE, num_seen)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    heads = (batch * tl.num_programs(1) + kv_head) * G + rows
    is_row, is_column = rows < G, columns < K
    q_at = heads[:, None] * K + columns[None, :]
    q = tl.load(q_ptr + q_at, mask=is_row[:, None] & is_column[None, :], other=0.0)
    k_at = k_ptr + batch * k_batch + kv_head * k_head + columns[None, :]
    v_at = v_ptr + batch * v_batch + kv_head * v_head + columns[None, :]
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(first, stop, TILE):
        tokens = start + tl.arange(0, TILE).to(tl.int64)
        is_seen = tokens < stop
        mask = is_seen[:, None] & is_column[None, :]
        k = tl.load(k_at + tokens[:, None] * k_token, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        shrink = tl.exp2(largest - new_largest)
        weights = tl.exp2(scores - new_largest[:, None])
        v = tl.load(v_at + tokens[:, None] * v_token, mask=mask, other=0.0)
        total = total * shrink + tl.sum(weights, axis=1)
        mixed = tl.dot(weights.to(v.dtype), v, mixed * shrink[:, None], input_precision="ieee")
        largest = new_largest
    has_keys = first < stop
    total = tl.where(has_keys, total, 1.0)
    slices = heads * num_slices + index
    tl.store(logs_ptr + slices, largest + tl.log2(total), mask=is_row)
    mask = is_row[:, None] & is_column[None, :] & has_keys
    tl.store(means_ptr + slices[:, None] * K + columns[None, :], mixed / total[:, None], mask=mask)


@triton.jit
def _join_kernel(
    means_ptr, logs_ptr, y_ptr, num_slices,
    K: tl.constexpr, WIDTH: tl.constexpr, SLICES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """means (B H, slices, K) weighed by 2 ** logs (B H, slices) -> y (B H, K)."""
    head = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    is_column = columns < K
    every = tl.arange(0, SLICES)
    logs = tl.load(logs_ptr + head * num_slices + every, mask=every < num_slices, other=float("-inf"))
    largest = tl.max(logs, axis=0)
    total = tl.sum(tl.exp2(logs - largest), axis=0)
    mixed = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, num_slices, TILE):
        slices = start + tl.arange(0, TILE)
        at = head * num_slices + slices
        tile_logs = tl.load(logs_ptr + at, mask=slices < num_slices, other=float("-inf"))
        mask = (tile_logs > float("-inf"))[:, None] & is_column[None, :]  # an empty slice left no mean
        means = tl.load(means_ptr + at[:, None] * K + columns[None, :], mask=mask, other=0.0)
        mixed += tl.sum(tl.exp2(tile_logs - largest)[:, None] * means, axis=0)
    tl.store(y_ptr + head * K + columns, (mixed / total).to(y_ptr.dtype.element_ty), mask=is_column)


def tile_tokens(width: int, element_size: int) -> int:
    """Keys of a tile: a power of two, of heads padded to `width`."""
    return min(max(SMALLEST_TILE_TOKENS, TILE_BYTES // (width * element_size)), LARGEST_TILE_TOKENS)


def slices_of(num_key_heads: int, num_tiles: int, num_processors: int) -> int:
    """Slices of each of the batch's B H' heads of keys, for all programs to run at once: one at least, and no
    more than there are tiles in the cache."""
    return max(1, min(num_tiles, PROGRAMS_PER_PROCESSOR * num_processors // num_key_heads))


def attention_step(q: Tensor, k: Tensor, v: Tensor, num_seen: Tensor) -> Tensor:
    """See archs.ops.attention.attention_step. q may have another dtype than the cache, as under autocast, and
    is rounded to the cache's. Raises ImplementationUnavailable for float64."""
    if k.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ImplementationUnavailable(
            f"implementation 'triton' of attention_step takes float32, bfloat16 or float16, not {k.dtype}; "
            "use 'sdpa'."
        )
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q = q.to(k.dtype).contiguous()
    k, v = (tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (k, v))
    batch_size, num_heads, K = q.shape
    S, num_kv_heads = k.shape[1:3]
    G = num_heads // num_kv_heads
    width = max(16, triton.next_power_of_2(K))
    tile = tile_tokens(width, q.element_size())
    processors = INTERPRETED_PROCESSORS
    if q.is_cuda:
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    slices = slices_of(batch_size * num_kv_heads, triton.cdiv(S, tile), processors)
    means = torch.empty(batch_size, num_heads, slices, K, dtype=torch.float32, device=q.device)
    logs = torch.empty(batch_size, num_heads, slices, dtype=torch.float32, device=q.device)
    strides = (*k.stride()[:3], *v.stride()[:3])
    rows = max(16, triton.next_power_of_2(G))
    with torch.cuda.device_of(q):
        _slice_kernel[(slices, num_kv_heads, batch_size)](
            q, k, v, num_seen, means, logs, K**-0.5 * math.log2(math.e), *strides,
            G, K, rows, width, tile, num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip
        _join_kernel[(batch_size * num_heads,)](
            means, logs, y, slices, K, width, triton.next_power_of_2(slices), JOINED_SLICES
        )
    return y
