"""Gated DeltaNet (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464) as a mixer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs.base import Flops, Mixer, Phase
from archs.layers import CausalConvolution, RMSNorm, initial_step_bias
from archs.ops.gated_delta_rule import OPERATION, gated_delta_rule, gated_delta_rule_step
from archs.ops.precision import accumulation_dtype

# The width of all keys together, against the model's: with expand_v 2 the layer has about 6 D^2 parameters.
KEY_SHARE = 0.75
# What the published code starts from: step sizes before any input is seen, and decay rates a unit step.
PUBLISHED_STEPS = (0.001, 0.1)
PUBLISHED_DECAYS = (0.0, 16.0)
# The epsilon under the root of the published normalisation of queries and keys.
UNIT_LENGTH_EPS = 1e-6


class GatedDeltaNetState(NamedTuple):
    """tail (B, H (2 K + V), W) of the convolution; memory (B, H, V, K), V the width of a value."""

    tail: Tensor
    memory: Tensor
    num_tokens: int


def unit_length(x: Tensor) -> Tensor:
    """x / sqrt(sum of squares + UNIT_LENGTH_EPS) over the last axis."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + UNIT_LENGTH_EPS)


class GatedDeltaNet(Mixer):
    """The Gated DeltaNet layer (arXiv 2412.06464, section 3.4 and figure 1), as published: q, k and v are
    projected, pass a depthwise causal convolution and SiLU, and q and k are normalised to unit length;
    alpha = exp(-exp(A_log) softplus(a + dt_bias)) and beta = sigmoid(b), with a and b linear in x, gate the
    memory; out_proj(norm(o) * silu(gate)), with the norm over each head and its weight shared.

    What the paper leaves open is taken from fla-org/flash-linear-attention, fla/layers/gated_deltanet.py:
    no biases, queries scaled by K^-1/2 (which the norm undoes but for its epsilon), the starts below, one
    beta and alpha a head. Its separate projections and convolutions are rows of one `in_proj` (q, k, v, g,
    a, b in this order) and one `conv1d` (q, k, v) here: the same function and the same start.

    head_width: K of queries and keys, default 0.75 d_model / num_heads. expand_v: a value's width / K.
    start_steps, start_decays: what training starts from, the ranges of softplus(dt_bias), log-uniform, and
                exp(A_log), uniform; the defaults are as published.
    chunk_tokens: Q, the tokens of a chunk in the matrix form; moves cost, not results.
    implementation: of archs.ops.gated_delta_rule.
    Raises ValueError where a size or a range makes no sense, or a width is not whole.
    """

    operation = OPERATION

    def __init__(
        self,
        *,
        d_model: int,
        num_heads: int,
        head_width: int | None = None,
        expand_v: float = 2.0,
        conv_width: int = 4,
        chunk_tokens: int = 64,
        norm_eps: float = 1e-5,
        start_steps: Sequence[float] = PUBLISHED_STEPS,
        start_decays: Sequence[float] = PUBLISHED_DECAYS,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        for name, value in (("num_heads", num_heads), ("chunk_tokens", chunk_tokens)):
            if value < 1:
                raise ValueError(f"{name}={value} must be positive")
        if head_width is None:
            head_width = int(KEY_SHARE * d_model) // num_heads
            if head_width * num_heads != KEY_SHARE * d_model:
                raise ValueError(
                    f"num_heads={num_heads} must divide {KEY_SHARE} * d_model = {KEY_SHARE * d_model:g}; "
                    "or give head_width"
                )
        value_width = round(expand_v * head_width)
        if head_width < 1 or value_width < 1 or value_width != expand_v * head_width:
            raise ValueError(
                f"head_width={head_width} and expand_v={expand_v} must make positive whole widths of keys "
                "and values"
            )
        if len(start_steps) != 2 or not 0 < start_steps[0] <= start_steps[1]:
            raise ValueError(f"start_steps={list(start_steps)} must be two positive numbers, smaller first")
        if len(start_decays) != 2 or not 0 <= start_decays[0] <= start_decays[1] or start_decays[1] == 0:
            raise ValueError(
                f"start_decays={list(start_decays)} must be two numbers, smaller first, the larger positive"
            )
        self.num_heads, self.head_width, self.value_width = num_heads, head_width, value_width
        self.chunk_tokens, self.implementation = chunk_tokens, implementation
        self.conv_channels = num_heads * (2 * head_width + value_width)
        self.gate_channels = num_heads * value_width
        self.in_proj = nn.Linear(d_model, self.conv_channels + self.gate_channels + 2 * num_heads, bias=False)
        self.conv1d = CausalConvolution(d_model=self.conv_channels, width=conv_width, use_bias=False)
        self.dt_bias = nn.Parameter(initial_step_bias(num_heads, start_steps))
        rates = torch.empty(num_heads).uniform_(*start_decays)
        self.A_log = nn.Parameter(rates.clamp_min(1e-6).log())  # a rate of 0 could never be trained
        self.norm = RMSNorm(value_width, eps=norm_eps)
        self.out_proj = nn.Linear(self.gate_channels, d_model, bias=False)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """(..., d_model) -> the convolution's input (..., H (2 K + V)), the output's gate (..., H V), and
        log alpha and beta (..., H) in the state's precision."""
        widths = (self.conv_channels, self.gate_channels, self.num_heads, self.num_heads)
        qkv, gate, a, b = self.in_proj(x).split(widths, dim=-1)
        dtype = accumulation_dtype(x.dtype)
        step = F.softplus(a.to(dtype) + self.dt_bias.to(dtype))
        return qkv, gate, (-torch.exp(self.A_log.to(dtype)) * step, b.to(dtype).sigmoid())

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split the convolution's output into q, k (..., H, K), of unit length but for q's scale, v (..., H,
        V)."""
        qk, v = F.silu(qkv).split((2 * self.num_heads * self.head_width, self.gate_channels), dim=-1)
        q, k = unit_length(qk.unflatten(-1, (2, self.num_heads, -1))).unbind(-3)
        return q * self.head_width**-0.5, k, v.unflatten(-1, (self.num_heads, -1))

    def _output(self, o: Tensor, gate: Tensor) -> Tensor:
        """o (..., H, V) and its gate (..., H V) -> (..., d_model)."""
        return self.out_proj(self.norm(o).flatten(-2) * F.silu(gate))

    def forward(self, x: Tensor) -> Tensor:
        qkv, gate, gates = self._project(x)
        inputs = (*self._heads(self.conv1d(qkv)), *gates)
        o, _ = gated_delta_rule(*inputs, chunk_tokens=self.chunk_tokens, implementation=self.implementation)
        return self._output(o, gate)

    def init_state(self, batch_size: int, max_context_tokens: int) -> GatedDeltaNetState:
        del max_context_tokens
        shape = (batch_size, self.num_heads, self.value_width, self.head_width)
        memory = self.A_log.new_zeros(shape, dtype=accumulation_dtype(self.A_log.dtype))
        return GatedDeltaNetState(self.conv1d.init_tail(batch_size), memory, 0)

    def prefill(self, x: Tensor, state: GatedDeltaNetState) -> tuple[Tensor, GatedDeltaNetState]:
        qkv, gate, gates = self._project(x)
        qkv, tail = self.conv1d.prefill(qkv, state.tail)
        o, memory = gated_delta_rule(
            *self._heads(qkv),
            *gates,
            state.memory if state.num_tokens else None,
            chunk_tokens=self.chunk_tokens,
            implementation=self.implementation,
        )
        state.memory.copy_(memory)
        return self._output(o, gate), GatedDeltaNetState(tail, state.memory, state.num_tokens + x.shape[1])

    def decode(self, x: Tensor, state: GatedDeltaNetState) -> tuple[Tensor, GatedDeltaNetState]:
        qkv, gate, gates = self._project(x)
        qkv, tail = self.conv1d.decode(qkv, state.tail)
        o = gated_delta_rule_step(*self._heads(qkv), *gates, state.memory, implementation=self.implementation)
        return self._output(o, gate), GatedDeltaNetState(tail, state.memory, state.num_tokens + 1)

    def step_kind(self, num_tokens: int) -> int:
        """Return 0: every step does the same work."""
        del num_tokens
        return 0

    def state_bytes_at(self, batch_size: int, context_tokens: int) -> int:
        """B H V K elements of the memory, and the tail."""
        del context_tokens
        elements = batch_size * self.gate_channels * self.head_width
        dtype = accumulation_dtype(self.A_log.dtype)
        return elements * dtype.itemsize + self.conv1d.tail_bytes(batch_size)

    def flops(self, context_tokens: int, phase: Phase) -> Flops:
        """Count per token: projections 2 weights each, 2 D H (2 K + 2 V + 2) + 2 H V D; convolution
        2 W H (2 K + V). Prefill, a chunk of Q tokens and head: products of keys and of queries with keys
        4 Q^2 K, the inverse applied to keys and values 2 Q^2 (K + V), scores times values 2 Q^2 V, the
        state read and written 6 Q K V; the last chunk may be shorter. Scan rule, likewise: Q^3 for the
        triangular solve, 4 Q^2 for the decays between tokens, 2 K V to carry the state. Decode, a head: key
        and query read the state, 4 K V; scan rule 3 K V: the decay and the update."""
        per_token = 2.0 * (self.in_proj.weight.numel() + self.out_proj.weight.numel())
        per_token += self.conv1d.flops_per_token()
        elements = self.gate_channels * self.head_width
        if phase == "decode":
            return Flops(matmul=per_token + 4.0 * elements, scan=3.0 * elements)
        num_whole, left = divmod(context_tokens, self.chunk_tokens)
        squares = num_whole * self.chunk_tokens**2 + left**2
        cubes = num_whole * self.chunk_tokens**3 + left**3
        products = 2.0 * squares * self.num_heads * (3 * self.head_width + 2 * self.value_width)
        num_chunks = num_whole + (left > 0)
        return Flops(
            matmul=context_tokens * (per_token + 6.0 * elements) + products,
            scan=self.num_heads * (cubes + 4.0 * squares) + 2.0 * num_chunks * elements,
        )
