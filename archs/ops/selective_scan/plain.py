"""The selective scan in plain PyTorch: chunk by chunk, a fused step a token, gradients by recomputation.

A chunk's decays and inputs are made at once in buffers that stay in cache; the recurrence then
costs one multiply-add call a token; the readout is a batch of matrix products. The factors are
multiplied one token at a time and never divided, so a decay of any strength is exact. Tensors are
token-major and states (B, N, E) inside, which keeps the long axis innermost.
Glossary in archs/ops/selective_scan.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from archs.ops.precision import accumulation_dtype

# Elements of one chunk buffer: 1 MB in float32. Measured on a CPU, 0.5 to 4 MB differ little. The
# bounds keep the chunks' overhead and, in training, the buffers small beside the whole scan.
CHUNK_ELEMENTS = 1 << 18
MIN_CHUNK_TOKENS, MAX_CHUNK_TOKENS = 8, 64


def _chunk_tokens(state: Tensor) -> int:
    return min(max(CHUNK_ELEMENTS // state.numel(), MIN_CHUNK_TOKENS), MAX_CHUNK_TOKENS)


def _run_chunk(dt: Tensor, dtx: Tensor, A: Tensor, B: Tensor, decay: Tensor, states: Tensor) -> None:
    """Fills decay (c, B, N, E) and states[1:] of (c + 1, B, N, E), given states[0].

    dt, dtx (c, B, E), A (N, E), B (c, B, N)."""
    torch.mul(dt[:, :, None], A, out=decay)
    decay.exp_()
    torch.mul(B[..., None], dtx[:, :, None], out=states[1:])
    steps = states.unbind(0)
    for factor, previous, state in zip(decay.unbind(0), steps, steps[1:], strict=False):
        state.addcmul_(factor, previous)


def _scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, starts: list[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """x, dt (T, B, E), A (N, E), B, C (T, B, N), state (B, N, E) -> y (T, B, E) and the last state.

    Appends each chunk's first state to `starts`, where given."""
    num_tokens, chunk = x.shape[0], _chunk_tokens(state)
    y = torch.empty_like(x)
    size = min(chunk, num_tokens)
    decay = state.new_empty(size, *state.shape)
    states = state.new_empty(size + 1, *state.shape)
    states[0] = state
    for first in range(0, num_tokens, chunk):
        tokens = slice(first, first + chunk)
        dt_c = dt[tokens]
        count = dt_c.shape[0]
        if starts is not None:
            starts.append(states[0].clone())
        _run_chunk(dt_c, dt_c * x[tokens], A, B[tokens], decay[:count], states[: count + 1])
        y[tokens] = torch.matmul(C[tokens][:, :, None], states[1 : count + 1])[:, :, 0]
        states[0] = states[count]
    return y, states[0].clone()


class _SelectiveScan(torch.autograd.Function):
    """`_scan` with gradients. Keeps one state a chunk and recomputes the others."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        starts: list[Tensor] = []
        y, last = _scan(x, dt, A, B, C, state, starts)
        ctx.save_for_backward(x, dt, A, B, C, torch.stack(starts))
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor, ...]:
        """With g_t the gradient of h_t: g_t = C_t dy_t + exp(dt_{t+1} A) g_{t+1}."""
        x, dt, A, B, C, starts = ctx.saved_tensors
        num_tokens, chunk = x.shape[0], _chunk_tokens(starts[0])
        dx, ddt, dB, dC = (torch.empty_like(tensor) for tensor in (x, dt, B, C))
        dA = torch.zeros_like(A)
        size = min(chunk, num_tokens)
        decay, scratch = (starts.new_empty(size, *starts.shape[1:]) for _ in range(2))
        states, g = (starts.new_empty(size + 1, *starts.shape[1:]) for _ in range(2))
        carried = dlast  # what reaches the chunk's last state from the tokens after it
        for index in reversed(range(len(starts))):
            tokens = slice(index * chunk, (index + 1) * chunk)
            x_c, dt_c, B_c, C_c, dy_c = x[tokens], dt[tokens], B[tokens], C[tokens], dy[tokens]
            dtx, count = dt_c * x_c, dt_c.shape[0]
            decay_c, states_c, g_c, scratch_c = decay[:count], states[: count + 1], g[:count], scratch[:count]
            states_c[0] = starts[index]
            _run_chunk(dt_c, dtx, A, B_c, decay_c, states_c)
            torch.mul(C_c[..., None], dy_c[:, :, None], out=g_c)
            steps, factors = g_c.unbind(0), decay_c.unbind(0)
            steps[-1].add_(carried)
            for t in range(count - 1, 0, -1):
                steps[t - 1].addcmul_(factors[t], steps[t])
            carried = factors[0] * steps[0]
            # Products and sums, here faster than a batch of matrix-vector products.
            dC[tokens] = torch.mul(states_c[1:], dy_c[:, :, None], out=scratch_c).sum(3)
            dB[tokens] = torch.mul(g_c, dtx[:, :, None], out=scratch_c).sum(3)
            ddtx = torch.matmul(B_c[:, :, None], g_c)[:, :, 0]
            # The gradient of the exponent dt A: g_t h_{t-1} exp(dt_t A).
            dexponent = g_c.mul_(states_c[:-1]).mul_(decay_c)
            ddt[tokens] = torch.mul(dexponent, A, out=scratch_c).sum(2).addcmul_(ddtx, x_c)
            dA += torch.mul(dexponent, dt_c[:, :, None], out=scratch_c).sum((0, 1))
            dx[tokens] = ddtx * dt_c
        return dx, ddt, dA, dB, dC, carried


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See archs.ops.selective_scan.selective_scan. Once differentiable. Memory beside the result: a few
    chunks' states, and in training one state a chunk."""
    dtype = accumulation_dtype(x.dtype)
    inputs, dt, A, B, C, D = (tensor.to(dtype) for tensor in (x, dt, A, B, C, D))
    if initial_state is None:
        state = inputs.new_zeros(x.shape[0], A.shape[1], A.shape[0])
    else:
        state = initial_state.to(dtype).transpose(1, 2)
    token_major = [tensor.transpose(0, 1) for tensor in (inputs, dt, B, C)]
    args = (token_major[0], token_major[1], A.t().contiguous(), token_major[2], token_major[3], state)
    with torch.autocast(x.device.type, enabled=False):  # the readout keeps the state's precision
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in args):
            y, last = _SelectiveScan.apply(*args)
        else:
            y, last = _scan(*args, None)
        y = torch.addcmul(y.transpose(0, 1), inputs, D)
    return y.to(x.dtype), last.transpose(1, 2)


def selective_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> Tensor:
    """See archs.ops.selective_scan.selective_step."""
    inputs, dt, A, B, C, D = (tensor.to(state.dtype) for tensor in (x, dt, A, B, C, D))
    state.mul_(torch.exp(dt[:, :, None] * A)).addcmul_((dt * inputs)[:, :, None], B[:, None, :])
    y = torch.bmm(state, C[:, :, None])[:, :, 0]
    return y.addcmul_(inputs, D).to(x.dtype)
