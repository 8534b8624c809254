"""Mamba (arXiv 2312.00752) and Mamba-2 (arXiv 2405.21060): selective state spaces as mixers.

Submodules and parameters carry the published names (`in_proj`, `conv1d`, `x_proj`, `dt_proj`, `A_log`,
`D`, `dt_bias`, `norm`, `out_proj`); the convolution's own sit one level lower, at `conv1d.conv`.
Below, D is d_model * expand, the width inside the layer; r is dt_rank, N state_width, W conv_width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs.base import Flops, Mixer, Phase
from archs.layers import CausalConvolution, RMSNorm, initial_step_bias, undecayed
from archs.ops.elementwise import rms_norm
from archs.ops.precision import accumulation_dtype
from archs.ops.selective_scan import OPERATION as SELECTIVE_SCAN
from archs.ops.selective_scan import selective_scan, selective_step
from archs.ops.ssd import OPERATION as SSD
from archs.ops.ssd import ssd, ssd_step

# What the published models start from. The step size (arXiv 2312.00752, section 3.6) is the one before
# any input is seen; a step of 0.001 to 0.1 writes little, and decays of 1 to 16 a unit step forget soon.
PUBLISHED_STEPS = (0.001, 0.1)
PUBLISHED_DECAYS = (1.0, 16.0)
# The epsilon of the gated norm in the published Mamba-2.
GATED_NORM_EPS = 1e-5
NO_STEP_LIMITS = (0.0, math.inf)


class MambaState(NamedTuple):
    """tail (B, channels, W) of the convolution; hidden (B, D, N), or in Mamba-2 (B, H, P, N)."""

    tail: Tensor
    hidden: Tensor
    num_tokens: int


def _check_positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be positive")


def _check_ranges(**ranges: Sequence[float]) -> None:
    for name, values in ranges.items():
        if len(values) != 2 or not 0 < values[0] <= values[1]:
            raise ValueError(f"{name}={list(values)} must be two positive numbers, the smaller one first")


def _inner_width(d_model: int, expand: int, inner_width: int | None) -> int:
    """`inner_width` where it is given, else expand * d_model."""
    if inner_width is None:
        return expand * d_model
    _check_positive(inner_width=inner_width)
    return inner_width


def _state_bytes(convolution: CausalConvolution, batch_size: int, hidden_elements: int) -> int:
    dtype = accumulation_dtype(convolution.conv.weight.dtype)
    return convolution.tail_bytes(batch_size) + batch_size * hidden_elements * dtype.itemsize


class Mamba(Mixer):
    """The Mamba layer (arXiv 2312.00752, section 3.4 and figure 3), as published.

    inner_width:    D, default expand * d_model.
    dt_rank:        width of the step size's bottleneck, default d_model / 16 rounded up.
    use_conv_bias:  bias of the convolution. use_bias: biases of in_proj and out_proj.
    start_steps, start_decay, start_skip, start_maps: what training starts from; the defaults are as
                    published. The range of the step sizes dt; A is -(1..N) times start_decay; D is
                    start_skip; x_proj's rows for B and C are drawn start_maps times as large.
    implementation: of archs.ops.selective_scan.
    Raises ValueError where a size or a range is not positive.
    """

    operation = SELECTIVE_SCAN

    def __init__(
        self,
        *,
        d_model: int,
        state_width: int = 16,
        conv_width: int = 4,
        expand: int = 2,
        inner_width: int | None = None,
        dt_rank: int | None = None,
        use_conv_bias: bool = True,
        use_bias: bool = False,
        start_steps: Sequence[float] = PUBLISHED_STEPS,
        start_decay: float = 1.0,
        start_skip: float = 1.0,
        start_maps: float = 1.0,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        _check_positive(d_model=d_model, state_width=state_width, expand=expand, dt_rank=dt_rank)
        _check_ranges(start_steps=start_steps)
        if start_decay <= 0:
            raise ValueError(f"start_decay={start_decay} must be positive")
        inner = _inner_width(d_model, expand, inner_width)
        self.inner_width, self.state_width, self.dt_rank = inner, state_width, dt_rank
        self.implementation = implementation
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=use_bias)
        self.conv1d = CausalConvolution(d_model=inner, width=conv_width, use_bias=use_conv_bias)
        self.x_proj = nn.Linear(inner, dt_rank + 2 * state_width, bias=False)
        self.dt_proj = nn.Linear(dt_rank, inner)
        self.A_log = undecayed((start_decay * torch.arange(1.0, state_width + 1)).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.full((inner,), float(start_skip)))
        self.out_proj = nn.Linear(inner, d_model, bias=use_bias)
        nn.init.uniform_(self.dt_proj.weight, -(dt_rank**-0.5), dt_rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(initial_step_bias(inner, start_steps))
            self.x_proj.weight[dt_rank:] *= start_maps

    def _scan_inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Project the activated convolution's output (..., D) to dt (..., D), A (D, N), B and C (..., N)."""
        dt, B, C = self.x_proj(x).split((self.dt_rank, self.state_width, self.state_width), dim=-1)
        # The bias is added in the state's precision: in bfloat16 it would move dt by a percent.
        dtype = accumulation_dtype(x.dtype)
        dt = F.linear(dt, self.dt_proj.weight).to(dtype) + self.dt_proj.bias.to(dtype)
        return F.softplus(dt), -torch.exp(self.A_log.to(dtype)), B, C

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.in_proj(x).chunk(2, dim=-1)
        x = F.silu(self.conv1d(x))
        y, _ = selective_scan(x, *self._scan_inputs(x), self.D, implementation=self.implementation)
        return self.out_proj(y * F.silu(gate))

    def init_state(self, batch_size: int, max_context_tokens: int) -> MambaState:
        del max_context_tokens
        dtype = accumulation_dtype(self.A_log.dtype)
        hidden = self.A_log.new_zeros(batch_size, *self.A_log.shape, dtype=dtype)
        return MambaState(self.conv1d.init_tail(batch_size), hidden, 0)

    def prefill(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        num_tokens = state.num_tokens + x.shape[1]
        x, gate = self.in_proj(x).chunk(2, dim=-1)
        x, tail = self.conv1d.prefill(x, state.tail)
        x = F.silu(x)
        initial = state.hidden if state.num_tokens else None
        y, hidden = selective_scan(
            x, *self._scan_inputs(x), self.D, initial, implementation=self.implementation
        )
        state.hidden.copy_(hidden)
        return self.out_proj(y * F.silu(gate)), MambaState(tail, state.hidden, num_tokens)

    def decode(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        x, gate = self.in_proj(x).chunk(2, dim=-1)
        x, tail = self.conv1d.decode(x, state.tail)
        x = F.silu(x)
        y = selective_step(x, *self._scan_inputs(x), self.D, state.hidden, implementation=self.implementation)
        return self.out_proj(y * F.silu(gate)), MambaState(tail, state.hidden, state.num_tokens + 1)

    def step_kind(self, num_tokens: int) -> int:
        """Return 0: every step does the same work."""
        del num_tokens
        return 0

    def state_bytes_at(self, batch_size: int, context_tokens: int) -> int:
        del context_tokens
        return _state_bytes(self.conv1d, batch_size, self.A_log.numel())

    def flops(self, context_tokens: int, phase: Phase) -> Flops:
        """Count per token: projections 2 weights each, 6 d D + 2 D (r + 2N) + 2 r D; convolution 2 W D;
        readout C h, a product, 2 D N. Scan rule, 7 D N: dt A and its exponential 2, the input 2, the
        multiply-add 2, the shared rest 1. So 9 D N for the recurrence in all."""
        num_tokens = context_tokens if phase == "prefill" else 1
        layers = (self.in_proj, self.x_proj, self.dt_proj, self.out_proj)
        matmul = 2.0 * sum(layer.weight.numel() for layer in layers) + self.conv1d.flops_per_token()
        elements = self.A_log.numel()
        return Flops(matmul=num_tokens * (matmul + 2.0 * elements), scan=7.0 * num_tokens * elements)


class Mamba2(Mixer):
    """The Mamba-2 layer (arXiv 2405.21060, section 7.1 and figure 6), as published.

    inner_width:    D, default expand * d_model.
    head_width:     P. num_heads: so many heads instead, of D / num_heads each.
    num_groups:     heads share B and C within a group.
    num_norm_groups: parts of D that the gated norm takes each for itself, default num_groups.
    norm_eps:       of the gated norm.
    step_limits:    the step sizes dt are clamped to this range, default no limit.
    chunk_tokens:   Q, the tokens of a chunk in the matrix form; moves cost, not results.
    use_conv_bias:  bias of the convolution. use_bias: biases of in_proj and out_proj.
    start_steps, start_decays, start_skip: what training starts from; the defaults are as published.
                    The ranges of the step sizes dt and of -A, and D.
    implementation: of archs.ops.ssd.
    Raises ValueError where a size or a range is not positive, head_width, num_heads or num_norm_groups
    does not divide D, or num_groups does not divide the heads.
    """

    operation = SSD

    def __init__(
        self,
        *,
        d_model: int,
        state_width: int = 128,
        head_width: int = 64,
        num_heads: int | None = None,
        num_groups: int = 1,
        num_norm_groups: int | None = None,
        expand: int = 2,
        inner_width: int | None = None,
        conv_width: int = 4,
        chunk_tokens: int = 256,
        use_conv_bias: bool = True,
        use_bias: bool = False,
        norm_eps: float = GATED_NORM_EPS,
        step_limits: Sequence[float] = NO_STEP_LIMITS,
        start_steps: Sequence[float] = PUBLISHED_STEPS,
        start_decays: Sequence[float] = PUBLISHED_DECAYS,
        start_skip: float = 1.0,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        _check_positive(d_model=d_model, state_width=state_width, head_width=head_width)
        _check_positive(num_groups=num_groups, expand=expand, chunk_tokens=chunk_tokens)
        _check_ranges(start_steps=start_steps, start_decays=start_decays)
        if len(step_limits) != 2 or not 0 <= step_limits[0] < step_limits[1]:
            raise ValueError(f"step_limits={list(step_limits)} must be two numbers, the smaller one first")
        inner = _inner_width(d_model, expand, inner_width)
        if num_heads is not None:
            if num_heads < 1 or inner % num_heads:
                raise ValueError(f"num_heads={num_heads} must divide expand * d_model = {inner}")
            head_width = inner // num_heads
        if inner % head_width:
            raise ValueError(f"head_width={head_width} must divide expand * d_model = {inner}")
        self.num_heads = inner // head_width
        if self.num_heads % num_groups:
            raise ValueError(f"num_groups={num_groups} must divide the {self.num_heads} heads")
        num_norm_groups = num_groups if num_norm_groups is None else num_norm_groups
        if num_norm_groups < 1 or inner % num_norm_groups:
            raise ValueError(f"num_norm_groups={num_norm_groups} must divide the inner width {inner}")
        self.inner_width, self.state_width, self.num_groups = inner, state_width, num_groups
        self.num_norm_groups, self.step_limits = num_norm_groups, tuple(step_limits)
        self.head_width, self.chunk_tokens, self.implementation = head_width, chunk_tokens, implementation
        self.conv_channels = inner + 2 * num_groups * state_width
        self.in_proj = nn.Linear(d_model, inner + self.conv_channels + self.num_heads, bias=use_bias)
        self.conv1d = CausalConvolution(d_model=self.conv_channels, width=conv_width, use_bias=use_conv_bias)
        self.dt_bias = nn.Parameter(initial_step_bias(self.num_heads, start_steps))
        self.A_log = nn.Parameter(torch.empty(self.num_heads).uniform_(*start_decays).log())
        self.D = nn.Parameter(torch.full((self.num_heads,), float(start_skip)))
        self.norm = RMSNorm(inner, eps=norm_eps)
        self.out_proj = nn.Linear(inner, d_model, bias=use_bias)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., d_model) -> gate (..., D), the convolution's input (..., D + 2 G N), dt (..., H)."""
        widths = (self.inner_width, self.conv_channels, self.num_heads)
        gate, xbc, dt = self.in_proj(x).split(widths, dim=-1)
        return gate, xbc, dt

    def _scan_inputs(self, xbc: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """-> x (..., H, P), dt (..., H), A (H,), B and C (..., G, N)."""
        grouped_width = self.num_groups * self.state_width
        x, B, C = F.silu(xbc).split((self.inner_width, grouped_width, grouped_width), dim=-1)
        dtype = accumulation_dtype(xbc.dtype)
        dt = F.softplus(dt.to(dtype) + self.dt_bias.to(dtype))
        if self.step_limits != NO_STEP_LIMITS:
            dt = dt.clamp(*self.step_limits)
        x = x.unflatten(-1, (-1, self.head_width))
        B, C = (maps.unflatten(-1, (-1, self.state_width)) for maps in (B, C))
        return x, dt, -torch.exp(self.A_log.to(dtype)), B, C

    def _output(self, y: Tensor, gate: Tensor) -> Tensor:
        """Apply the gated norm, over each norm group's channels, and the output projection; y (..., H, P)."""
        y = (y.flatten(-2) * F.silu(gate)).unflatten(-1, (self.num_norm_groups, -1))
        y = rms_norm(y, None, eps=self.norm.eps).flatten(-2) * self.norm.weight
        return self.out_proj(y)

    def forward(self, x: Tensor) -> Tensor:
        gate, xbc, dt = self._project(x)
        inputs = self._scan_inputs(self.conv1d(xbc), dt)
        y, _ = ssd(*inputs, self.D, chunk_tokens=self.chunk_tokens, implementation=self.implementation)
        return self._output(y, gate)

    def init_state(self, batch_size: int, max_context_tokens: int) -> MambaState:
        del max_context_tokens
        shape = (batch_size, self.num_heads, self.head_width, self.state_width)
        hidden = self.A_log.new_zeros(shape, dtype=accumulation_dtype(self.A_log.dtype))
        return MambaState(self.conv1d.init_tail(batch_size), hidden, 0)

    def prefill(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        gate, xbc, dt = self._project(x)
        xbc, tail = self.conv1d.prefill(xbc, state.tail)
        y, hidden = ssd(
            *self._scan_inputs(xbc, dt),
            self.D,
            state.hidden if state.num_tokens else None,
            chunk_tokens=self.chunk_tokens,
            implementation=self.implementation,
        )
        state.hidden.copy_(hidden)
        return self._output(y, gate), MambaState(tail, state.hidden, state.num_tokens + x.shape[1])

    def decode(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        gate, xbc, dt = self._project(x)
        xbc, tail = self.conv1d.decode(xbc, state.tail)
        y = ssd_step(*self._scan_inputs(xbc, dt), self.D, state.hidden, implementation=self.implementation)
        return self._output(y, gate), MambaState(tail, state.hidden, state.num_tokens + 1)

    def step_kind(self, num_tokens: int) -> int:
        """Return 0: every step does the same work."""
        del num_tokens
        return 0

    def state_bytes_at(self, batch_size: int, context_tokens: int) -> int:
        del context_tokens
        return _state_bytes(self.conv1d, batch_size, self.inner_width * self.state_width)

    def flops(self, context_tokens: int, phase: Phase) -> Flops:
        """Count per token: projections 2d (2D + 2 G N + H) + 2 D d; convolution 2 W (D + 2 G N). A chunk of
        Q tokens, prefill: C B' 2 Q^2 N G, its product with x 2 Q^2 D, states in and out 4 Q N D;
        the last chunk may be shorter. Scan rule: 3 Q^2 H a chunk for the decays between its tokens
        and 2 N D for carrying the state. Decode: readout 2 N D, and 4 N D scan for the update."""
        projections = 2.0 * (self.in_proj.weight.numel() + self.out_proj.weight.numel())
        per_token = projections + self.conv1d.flops_per_token()
        elements = self.inner_width * self.state_width
        if phase == "decode":
            return Flops(matmul=per_token + 2.0 * elements, scan=4.0 * elements)
        num_whole, left = divmod(context_tokens, self.chunk_tokens)
        squares = num_whole * self.chunk_tokens**2 + left**2
        pairs = 2.0 * squares * (self.num_groups * self.state_width + self.inner_width)
        num_chunks = num_whole + (left > 0)
        return Flops(
            matmul=context_tokens * (per_token + 4.0 * elements) + pairs,
            scan=3.0 * squares * self.num_heads + 2.0 * num_chunks * elements,
        )
