"""TTT-MLP in Triton: forward and backward, any length, position and head width.

archs.ops.ttt_mlp.kernel_forward and kernel_backward say what a program keeps on chip and what the serial
chain is; a single token goes through kernel_decode. Where gradients are asked for, the N mini-batches are cut
into about sqrt(N) groups: the forward pass keeps the inner weights between groups, and the backward pass runs
one group after another again and keeps, for that group alone, the weights between its mini-batches. Both grow
with the square root of the sequence's length.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from archs.ops.operation import ImplementationUnavailable
from archs.ops.ttt_mlp import TTTMLPWeights
from archs.ops.ttt_mlp.kernel_backward import backward_kernel
from archs.ops.ttt_mlp.kernel_decode import decode
from archs.ops.ttt_mlp.kernel_forward import forward_kernel

MAX_CHUNK_TOKENS = 32  # longer mini-batches are walked in chunks of so many tokens


class Shape(NamedTuple):
    """Sizes of one call, and how the kernels cut it."""

    batch_size: int
    num_tokens: int
    num_heads: int
    head_width: int
    mini_batch_tokens: int
    position: int

    @property
    def chunk_tokens(self) -> int:
        """BT: tokens a chunk, with its padding."""
        return min(MAX_CHUNK_TOKENS, max(16, triton.next_power_of_2(self.mini_batch_tokens)))

    @property
    def chunks(self) -> int:
        """Chunks a mini-batch."""
        return -(-self.mini_batch_tokens // self.chunk_tokens)

    @property
    def num_programs(self) -> int:
        return self.batch_size * self.num_heads

    def num_mini_batches(self) -> int:
        """Mini-batches that the call touches, the open ones at both ends included."""
        return -(-(self.position + self.num_tokens) // self.mini_batch_tokens)

    def num_closed(self, stop: int) -> int:
        """How many of the call's first `stop` mini-batches it closes."""
        return min(stop, (self.position + self.num_tokens) // self.mini_batch_tokens)

    def chunk_range(self, start: int, stop: int) -> tuple[int, int]:
        """The chunks of mini-batches start..stop that hold tokens of the call."""
        last = self.position + self.num_tokens - 1
        n, row = divmod(last, self.mini_batch_tokens)
        end = n * self.chunks + row // self.chunk_tokens + 1
        return max(start * self.chunks, self.position // self.chunk_tokens), min(stop * self.chunks, end)

    def groups(self) -> list[tuple[int, int]]:
        """The mini-batches cut into about as many groups as a group has mini-batches."""
        num = self.num_mini_batches()
        size = math.isqrt(num - 1) + 1
        return [(start, min(start + size, num)) for start in range(0, num, size)]

    def launch_options(self, precision: str) -> dict[str, Any]:
        """Tile sizes, warps and stages of both kernels. The tiles are as large as spare the registers; as
        compiled for sm_90 a program's shared memory ends at 170 KB."""
        padded = max(16, triton.next_power_of_2(self.head_width))
        is_small = padded <= 64 and self.chunk_tokens == 16 and precision != "ieee"
        return {
            "MINI_BATCH": self.mini_batch_tokens,
            "K": self.head_width,
            "KP": padded,
            "FB": 64 if is_small else 32,
            "BT": self.chunk_tokens,
            "PRECISION": precision,
            "num_warps": 8,
            "num_stages": 1,  # blocks are written in the loop that reads them
            "maxnreg": 255,  # all there are; left alone, ptxas takes 32 for some sizes and spills the rest
        }


def precision_of(dtype: torch.dtype) -> str:
    """How the kernels multiply, for tokens of `dtype`. TF32's mantissa of 10 bits holds a half-precision
    token whole and rounds the weights less than bfloat16 would."""
    return "tf32" if dtype in (torch.bfloat16, torch.float16) else "ieee"


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def walk(
    shape: Shape,
    start: int,
    stop: int,
    inputs: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    opened: tuple[Tensor, ...],
    y: Tensor,
    norm_eps: float,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Mini-batches start..stop of the call: writes their y, returns the weights behind them (those given,
    where none closes) and the open gradient. One token is decoded, whether gradients are recorded or not, so
    that both give the same numbers."""
    closes = shape.num_closed(stop) > start
    new_weights = tuple(torch.empty_like(w) for w in weights) if closes else weights
    new_opened = tuple(torch.empty_like(g) for g in opened)
    with on_device_of(y):
        if shape.num_tokens == 1:
            decode(inputs, weights, opened, y, new_weights, new_opened, shape.position, norm_eps)
            return new_weights, new_opened
        forward_kernel[(shape.num_programs,)](
            *inputs,
            *weights,
            *opened,
            y,
            *new_weights,
            *new_opened,
            *(y, y, y),
            shape.num_heads,
            shape.num_tokens,
            shape.position,
            *shape.chunk_range(start, stop),
            norm_eps,
            *(1, 1),
            IS_RECOMPUTED=False,
            **shape.launch_options(precision_of(inputs[0].dtype)),
        )
    return new_weights, new_opened


class Gradients(NamedTuple):
    """What `backward_kernel` writes: the state's gradients and those of the LayerNorm's weight and bias a
    program are carried from group to group, the rest is a token's."""

    weight_in: Tensor
    weight_out: Tensor
    gradient_in: Tensor
    gradient_out: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor
    token_scale: Tensor
    ln_weight: Tensor
    ln_bias: Tensor


def walk_back(
    shape: Shape,
    start: int,
    stop: int,
    inputs: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    opened: tuple[Tensor, ...],
    dy: Tensor,
    gradients: Gradients,
    norm_eps: float,
) -> None:
    """Runs mini-batches start..stop again from the weights before them, then backward."""
    first, end = shape.chunk_range(start, stop)
    num_programs, num_chunks, w_slots = shape.num_programs, end - first, stop - start
    g_slots = num_chunks if shape.chunks > 1 else 1
    options = shape.launch_options(precision_of(inputs[0].dtype))
    tokens, width, hidden = shape.chunk_tokens, options["KP"], 4 * shape.head_width

    def buffer(*sizes: int) -> Tensor:
        return torch.empty(num_programs, *sizes, dtype=torch.float32, device=dy.device)

    slots = [buffer(w_slots, *w.shape[2:]) for w in weights] + [buffer(g_slots, *g.shape[2:]) for g in opened]
    saved = [buffer(num_chunks, tokens, columns) for columns in (width, width, tokens)]
    scratch = buffer(4, tokens, -(-hidden // options["FB"]) * options["FB"])
    sizes = (shape.num_heads, shape.num_tokens, shape.position, first, end, norm_eps, w_slots, g_slots)
    with on_device_of(dy):
        forward_kernel[(num_programs,)](
            *inputs, *weights, *opened, dy, *slots, *saved, *sizes, IS_RECOMPUTED=True, **options
        )
        backward_kernel[(num_programs,)](
            *inputs, *weights, *opened, *slots, *saved, dy, *gradients, scratch, *sizes, **options
        )


class TTTMLPFunction(torch.autograd.Function):
    """q, k, v, lr, token_scale, ln_weight, ln_bias, the state's four parts -> y and the new state's."""

    @staticmethod
    def forward(ctx: Any, position: int, norm_eps: float, *tensors: Tensor) -> tuple[Tensor, ...]:
        contiguous = tuple(t.contiguous() for t in tensors)
        inputs, weights, opened = contiguous[:7], contiguous[7:9], contiguous[9:]
        shape = Shape(*inputs[0].shape, inputs[4].shape[0], position)
        y = torch.empty_like(inputs[0])
        between = []
        first_opened = opened
        for start, stop in shape.groups():
            between.append(weights)
            weights, opened = walk(shape, start, stop, inputs, weights, opened, y, norm_eps)
        ctx.save_for_backward(*inputs, *first_opened, *(w for pair in between for w in pair))
        ctx.shape, ctx.norm_eps = shape, norm_eps
        return y, *weights, *opened

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *d_state: Tensor) -> tuple[Tensor | None, ...]:
        shape: Shape = ctx.shape
        inputs, opened, between = ctx.saved_tensors[:7], ctx.saved_tensors[7:9], ctx.saved_tensors[9:]
        q, k, v, lr, token_scale, ln_weight, ln_bias = inputs
        dy = dy.contiguous()
        a_program = (shape.batch_size, shape.num_heads, shape.head_width)
        gradients = Gradients(
            *(d.clone(memory_format=torch.contiguous_format) for d in d_state),
            *(torch.empty_like(t) for t in (q, k, v, lr)),
            torch.empty_like(lr, dtype=torch.float32),
            *(torch.zeros(a_program, dtype=torch.float32, device=q.device) for _ in range(2)),
        )
        for i, (start, stop) in reversed(list(enumerate(shape.groups()))):
            weights = between[2 * i : 2 * i + 2]
            walk_back(shape, start, stop, inputs, weights, opened, dy, gradients, ctx.norm_eps)
        padding = (0, 0, shape.position, -(shape.position + shape.num_tokens) % shape.mini_batch_tokens)
        by_position = torch.nn.functional.pad(gradients.token_scale, padding)
        by_position = by_position.unflatten(1, (-1, shape.mini_batch_tokens)).sum(dim=(0, 1, 3))
        return (
            *(None, None),
            *gradients[4:8],
            by_position.to(token_scale.dtype),
            gradients.ln_weight.sum(dim=0).to(ln_weight.dtype),
            gradients.ln_bias.sum(dim=0).to(ln_bias.dtype),
            *gradients[:4],
        )


def ttt_mlp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    token_scale: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    state: TTTMLPWeights,
    position: int,
    *,
    norm_eps: float,
) -> tuple[Tensor, TTTMLPWeights]:
    """See archs.ops.ttt_mlp.ttt_mlp. The tokens and parameters come in their own dtypes; all arithmetic is
    float32. Raises ImplementationUnavailable for a state of another dtype."""
    for part in state:
        if part.dtype != torch.float32:
            raise ImplementationUnavailable(
                f"implementation 'triton' of ttt_mlp keeps a float32 state, not {part.dtype}"
            )
    tensors = (q, k, v, lr, token_scale, ln_weight, ln_bias, *state)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        y, *parts = TTTMLPFunction.apply(position, norm_eps, *tensors)
        return y, TTTMLPWeights(*parts)
    contiguous = tuple(t.contiguous() for t in tensors)
    inputs, weights, opened = contiguous[:7], contiguous[7:9], contiguous[9:]
    shape = Shape(*q.shape, token_scale.shape[0], position)
    y = torch.empty_like(inputs[0])
    weights, opened = walk(shape, 0, shape.num_mini_batches(), inputs, weights, opened, y, norm_eps)
    return y, TTTMLPWeights(*weights, *opened)
