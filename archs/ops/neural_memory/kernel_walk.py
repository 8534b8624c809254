"""The walks along the chunks, forward and backward: one program a head of a sequence.

A memory of published size (head width 64, expansion 4, depth 2: 128 KiB of weights, as much of momentum) does
not fit one program's registers, so it stays in global memory, in practice in the L2 cache, and passes through
the program in tiles; on chip are a tile of each operand, an accumulator of (ROWS, TILE) and matrices of
(ROWS, ROWS). The serial chain is one chunk after the other, and in each the passes of kernel_tiles, with a
barrier after every layer: depth up, depth - 1 down and depth up again forward, about twice that backward.

The forward walk leaves weights and momentum at every `checkpoint_chunks`-th chunk. The backward walk takes
these groups of chunks from the last to the first, writes the states within a group again, and goes through
its chunks backwards. Names as in kernel_tiles; g_ before a name is the gradient of the outer loss.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from archs.ops.neural_memory.kernel_gradients import carried_backward, keys_backward, layers_backward
from archs.ops.neural_memory.kernel_tiles import COUNTS, copy_tokens, keys, layers, span_of

#: Numbers copied at once.
COPY = tl.constexpr(1024)


@triton.jit
def copy_numbers(source, target, NUM: tl.constexpr):
    for i in range(0, NUM, COPY):
        at = i + tl.arange(0, COPY)
        tl.store(target + at, tl.load(source + at, mask=at < NUM), mask=at < NUM)


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mixing_ptr,
    vectors_ptr,
    carried_ptr,
    checkpoints_ptr,
    arrays_ptr,
    y_ptr,
    num_tokens,
    num_heads,
    num_chunks,
    position,
    checkpoint_chunks,
    HAS_START: tl.constexpr,
    HAS_CHECKPOINTS: tl.constexpr,
    NUM_WEIGHTS: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    DEPTH: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    WIDEST: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """q, k, v (B, T, H, width) and coefficients -> y (B, T, H, V), and carried, (B H, 2 or 3, P): weights
    and momentum, in place, and the weights before the open chunk's first token where HAS_START."""
    program = tl.program_id(0).to(tl.int64)
    row, head = program // num_heads, program % num_heads
    k_stride, v_stride = num_heads * KEY_WIDTH, num_heads * VALUE_WIDTH
    ARRAYS: tl.constexpr = DEPTH * ROWS * WIDEST
    a = arrays_ptr + program * 4 * ARRAYS
    z, d, x = a + ARRAYS, a + 2 * ARRAYS, a + 3 * ARRAYS
    m = carried_ptr + program * (2 + HAS_START) * NUM_WEIGHTS
    s = m + NUM_WEIGHTS
    num_checkpoints = tl.cdiv(num_chunks, checkpoint_chunks)
    for chunk in range(num_chunks):
        first, count = span_of(chunk, position, num_tokens, CHUNK)
        token = (row * num_tokens + first) * num_heads + head
        mixing = mixing_ptr + (program * num_chunks + chunk) * ROWS * ROWS
        vectors = vectors_ptr + (program * num_chunks + chunk) * 5 * ROWS
        if HAS_CHECKPOINTS:  # noqa: SIM102 -- known when it is compiled
            if chunk % checkpoint_chunks == 0:
                slot = program * num_checkpoints + chunk // checkpoint_chunks
                copy_numbers(m, checkpoints_ptr + slot * 2 * NUM_WEIGHTS, 2 * NUM_WEIGHTS)
        copy_tokens(k_ptr + token * KEY_WIDTH, k_stride, count, a, KEY_WIDTH, ROWS, WIDEST, TILE)
        copy_tokens(q_ptr + token * KEY_WIDTH, k_stride, count, x, KEY_WIDTH, ROWS, WIDEST, TILE)
        tl.debug_barrier()
        w = m
        if HAS_START:
            w = m + tl.where(chunk == 0, 2 * NUM_WEIGHTS, 0)
        values = v_ptr + token * VALUE_WIDTH
        keys(
            values, v_stride, count, w, a, z, z, d, False,
            VALUE_WIDTH, DEPTH, K, F, V, ROWS, WIDEST, TILE, PRECISION,
        )  # fmt: skip
        y = y_ptr + token * VALUE_WIDTH
        layers(
            y, v_stride, count, mixing, vectors, m, s, m, s, a, d, x, z, True, False, True, True,
            VALUE_WIDTH, DEPTH, K, F, V, ROWS, WIDEST, TILE, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mixing_ptr,
    vectors_ptr,
    checkpoints_ptr,
    states_ptr,
    arrays_ptr,
    g_y_ptr,
    g_carried_ptr,
    g_q_ptr,
    g_k_ptr,
    g_v_ptr,
    g_mixing_ptr,
    g_vectors_ptr,
    num_tokens,
    num_heads,
    num_chunks,
    position,
    checkpoint_chunks,
    HAS_START: tl.constexpr,
    NUM_WEIGHTS: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    DEPTH: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    WIDEST: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What forward_kernel read, its checkpoints and the gradients of its outputs -> the gradients of its
    inputs. g_carried as carried, in place. states (B H, checkpoint_chunks + HAS_START, 2, P) is scratch,
    where HAS_START with the start in its last place."""
    program = tl.program_id(0).to(tl.int64)
    row, head = program // num_heads, program % num_heads
    k_stride, v_stride = num_heads * KEY_WIDTH, num_heads * VALUE_WIDTH
    ARRAYS: tl.constexpr = DEPTH * ROWS * WIDEST
    ARRAY: tl.constexpr = ROWS * WIDEST
    STATE: tl.constexpr = 2 * NUM_WEIGHTS
    a = arrays_ptr + program * 11 * ARRAYS
    z, u, d = a + ARRAYS, a + 2 * ARRAYS, a + 3 * ARRAYS
    x, z_x, g_out = a + 4 * ARRAYS, a + 5 * ARRAYS, a + 6 * ARRAYS
    # Gradients: of d and a so far, of u, of z by way of u, and of z.
    g_d, g_a, g_u, g_z = a + 7 * ARRAYS, a + 8 * ARRAYS, a + 9 * ARRAYS, a + 10 * ARRAYS
    states = states_ptr + program * (checkpoint_chunks + HAS_START) * STATE
    g_m = g_carried_ptr + program * (2 + HAS_START) * NUM_WEIGHTS
    g_s = g_m + NUM_WEIGHTS
    g_start = g_m + STATE
    state = tl.full((), STATE, tl.int64)
    num_groups = tl.cdiv(num_chunks, checkpoint_chunks)
    for step in range(num_groups):
        group = num_groups - 1 - step
        begin = group * checkpoint_chunks
        length = tl.minimum(checkpoint_chunks, num_chunks - begin)
        copy_numbers(checkpoints_ptr + (program * num_groups + group) * STATE, states, STATE)
        tl.debug_barrier()
        for place in range(length - 1):
            chunk = begin + place
            first, count = span_of(chunk, position, num_tokens, CHUNK)
            token = (row * num_tokens + first) * num_heads + head
            mixing = mixing_ptr + (program * num_chunks + chunk) * ROWS * ROWS
            vectors = vectors_ptr + (program * num_chunks + chunk) * 5 * ROWS
            m = states + place * state
            w = m
            if HAS_START:
                w = states + tl.where(chunk == 0, checkpoint_chunks, place) * state
            copy_tokens(k_ptr + token * KEY_WIDTH, k_stride, count, a, KEY_WIDTH, ROWS, WIDEST, TILE)
            tl.debug_barrier()
            values = v_ptr + token * VALUE_WIDTH
            keys(
                values, v_stride, count, w, a, z, u, d, False,
                VALUE_WIDTH, DEPTH, K, F, V, ROWS, WIDEST, TILE, PRECISION,
            )  # fmt: skip
            s = m + NUM_WEIGHTS
            layers(
                values, v_stride, count, mixing, vectors, m, s, m + STATE, s + STATE, a, d, x, z_x,
                False, False, False, True, VALUE_WIDTH, DEPTH, K, F, V, ROWS, WIDEST, TILE, PRECISION,
            )  # fmt: skip
        for back in range(length):
            place = length - 1 - back
            chunk = begin + place
            first, count = span_of(chunk, position, num_tokens, CHUNK)
            token = (row * num_tokens + first) * num_heads + head
            mixing = mixing_ptr + (program * num_chunks + chunk) * ROWS * ROWS
            vectors = vectors_ptr + (program * num_chunks + chunk) * 5 * ROWS
            m = states + place * state
            s = m + NUM_WEIGHTS
            w = m
            if HAS_START:
                w = states + tl.where(chunk == 0, checkpoint_chunks, place) * state
            # The forward pass once more.
            copy_tokens(k_ptr + token * KEY_WIDTH, k_stride, count, a, KEY_WIDTH, ROWS, WIDEST, TILE)
            copy_tokens(q_ptr + token * KEY_WIDTH, k_stride, count, x, KEY_WIDTH, ROWS, WIDEST, TILE)
            top = (DEPTH - 1) * ARRAY
            values = v_ptr + token * VALUE_WIDTH
            g_outputs = g_y_ptr + token * VALUE_WIDTH
            copy_tokens(g_outputs, v_stride, count, g_out + top, VALUE_WIDTH, ROWS, WIDEST, TILE)
            tl.debug_barrier()
            keys(
                values, v_stride, count, w, a, z, u, d, True,
                VALUE_WIDTH, DEPTH, K, F, V, ROWS, WIDEST, TILE, PRECISION,
            )  # fmt: skip
            layers(
                values, v_stride, count, mixing, vectors, m, s, m, s, a, d, x, z_x,
                True, True, False, False, VALUE_WIDTH, DEPTH, K, F, V, ROWS, WIDEST, TILE, PRECISION,
            )  # fmt: skip
            # Back through queries, new weights and new momentum: g_out, g_d, g_a.
            g_vectors = g_vectors_ptr + (program * num_chunks + chunk) * 5 * ROWS
            g_mixing = g_mixing_ptr + (program * num_chunks + chunk) * ROWS * ROWS
            g_queries = g_q_ptr + token * KEY_WIDTH
            layers_backward(
                g_queries, k_stride, count, mixing, vectors, g_mixing, g_vectors, m, s, g_m, g_s,
                a, d, x, z_x, g_out, g_d, g_a, KEY_WIDTH, DEPTH, K, F, V, ROWS, WIDEST, TILE, PRECISION,
            )  # fmt: skip
            # Back through the keys' deltas and the keys' way up: g_u, g_z.
            g_keys, g_values = g_k_ptr + token * KEY_WIDTH, g_v_ptr + token * VALUE_WIDTH
            keys_backward(
                g_keys, g_values, k_stride, v_stride, count, w, z, u, g_d, g_a, g_u, g_z,
                KEY_WIDTH, VALUE_WIDTH, DEPTH, K, F, V, ROWS, WIDEST, TILE, PRECISION,
            )  # fmt: skip
            is_start = False
            if HAS_START:
                is_start = chunk == 0
            carried_backward(
                vectors, g_vectors, count, m, s, g_m, g_s, g_start, a, d, x, g_out, g_u, g_d, is_start,
                HAS_START, DEPTH, K, F, V, ROWS, WIDEST, TILE, PRECISION,
            )  # fmt: skip
