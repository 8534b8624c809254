"""Titans' long-term memory as a mixer (Behrouz et al. 2025, arXiv 2501.00663, sections 3 and 4)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs.base import Phase
from archs.layers import CausalConvolution, RMSNorm
from archs.ops.neural_memory import OPERATION, NeuralMemoryState, neural_memory
from archs.ops.precision import accumulation_dtype

#: The largest momentum: a gradient is repeated by the momenta of the tokens after it, at most
#: 1 / (1 - MAX_MOMENTUM) times whatever they are, and the step is divided by just that.
MAX_MOMENTUM = 0.75

#: The largest steps of a chunk, added up: more overshoots where a chunk's keys are alike.
STEP_PER_CHUNK = 1.0

#: Of the last matrix' starting values, against 1 / sqrt(rows) of the others.
LAST_START_SCALE = 0.02


class NeuralMemory(nn.Module):
    """Projections, gates and learned start around the operation `neural_memory`: what the Titans
    architectures share.

    q, k and v are projected and, with `conv_width` > 0, pass a depthwise causal convolution
    (section 4.4), each then a SiLU and a normalisation to unit length. Every head's memory is a network
    of `memory_depth` matrices with hidden width `memory_expansion` times the head's. Decay, step size
    and momentum are sigmoids of a linear map of the input, one value a token and head, the latter two
    times a ceiling.

    This project's own, where the paper gives nothing or this departs from it:
    - v is normalised too: what is read is normalised after it anyway, and nothing else would bound what
      the memory is asked to hold.
    - Momentum is at most MAX_MOMENTUM, and the step is divided by the repetitions that allows, so that
      no sequence of gates repeats a gradient more often than it was scaled for.
    - `max_step_size` None is STEP_PER_CHUNK / chunk_tokens: a chunk's gradients are all taken at one point.
    - The last matrix starts near zero, so that what has been written is not drowned by what an empty
      memory answers, and the gates of step and momentum start nearly open.

    use_momentum, use_decay: the paper's ablations (its Table 5); False holds the gate at zero.
    Raises ValueError where a size makes no sense.
    """

    operation = OPERATION

    def __init__(
        self,
        *,
        d_model: int,
        num_heads: int,
        memory_depth: int = 2,
        memory_expansion: int = 2,
        chunk_tokens: int = 16,
        use_momentum: bool = True,
        use_decay: bool = True,
        conv_width: int = 4,
        max_step_size: float | None = None,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        if num_heads < 1 or d_model % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide d_model={d_model}")
        if not 1 <= memory_depth <= 4:
            raise ValueError(f"memory_depth={memory_depth} must lie between 1 and 4")
        for name, value in (("memory_expansion", memory_expansion), ("chunk_tokens", chunk_tokens)):
            if value < 1:
                raise ValueError(f"{name}={value} must be positive")
        if max_step_size is not None and max_step_size <= 0:
            raise ValueError(f"max_step_size={max_step_size} must be positive")
        self.d_model, self.num_heads, self.head_width = d_model, num_heads, d_model // num_heads
        self.chunk_tokens = chunk_tokens
        self.max_step_size = max_step_size or STEP_PER_CHUNK / chunk_tokens
        self.use_momentum, self.use_decay = use_momentum, use_decay
        self.implementation = implementation
        self.projections = nn.ModuleList(nn.Linear(d_model, d_model, bias=False) for _ in range(3))
        self.convs = nn.ModuleList(
            CausalConvolution(d_model=d_model, width=conv_width) for _ in range(3 if conv_width else 0)
        )
        self.gates = nn.Linear(d_model, 3 * num_heads)  # decay, step size, momentum
        hidden = memory_expansion * self.head_width
        widths = [self.head_width] + [hidden] * (memory_depth - 1) + [self.head_width]
        self.start = nn.ParameterList(
            torch.randn(num_heads, rows, columns) / math.sqrt(rows)
            for rows, columns in itertools.pairwise(widths)
        )
        with torch.no_grad():
            self.start[-1].mul_(LAST_START_SCALE)
        nn.init.normal_(self.gates.weight, std=d_model**-0.5)
        with torch.no_grad():  # sigmoid: decay 0.7%, 88% of the largest step and momentum
            self.gates.bias.copy_(torch.tensor([-5.0, 2.0, 2.0]).repeat_interleave(num_heads))

    def project(self, which: int, x: Tensor, tail: Tensor | None = None) -> Tensor:
        """(B, C, D) -> q (which 0), k (1) or v (2), (B, C, H, K); updates `tail` in place."""
        x = self.projections[which](x)
        if self.convs:
            conv = self.convs[which]
            x = conv(x) if tail is None else conv.prefill(x, tail)[0]
        return F.normalize(F.silu(x).unflatten(-1, (self.num_heads, -1)), dim=-1)

    def step(
        self, x: Tensor, memory: NeuralMemoryState, position: int, tails: Sequence[Tensor] | None
    ) -> tuple[Tensor, NeuralMemoryState]:
        """Write (B, C, D) and read it back, (B, C, D): a token sees itself written.

        `position` tokens of the open chunk are already written; `tails` are those of q, k and v,
        None at the start of a text whose state nobody keeps."""
        tails = tails or (None, None, None)
        qkv = [self.project(which, x, tail) for which, tail in enumerate(tails)]
        gates = self.gates(x).to(memory.weights[0].dtype).sigmoid()
        decay, step_size, momentum = gates.chunk(3, dim=-1)
        decay = decay if self.use_decay else torch.zeros_like(decay)
        momentum = MAX_MOMENTUM * momentum if self.use_momentum else torch.zeros_like(momentum)
        scale = self.max_step_size * (1 - MAX_MOMENTUM if self.use_momentum else 1)
        y, memory = neural_memory(
            *qkv,
            decay,
            scale * step_size,
            momentum,
            memory,
            position,
            chunk_tokens=self.chunk_tokens,
            implementation=self.implementation,
        )
        return y.flatten(2), memory

    def init_memory(self, batch_size: int) -> NeuralMemoryState:
        """Return the learned start for every row; differentiable with respect to it."""
        dtype = accumulation_dtype(self.start[0].dtype)
        start, weights = (
            tuple(w.to(dtype).expand(batch_size, *w.shape).clone() for w in self.start) for _ in range(2)
        )
        return NeuralMemoryState(start, weights, tuple(torch.zeros_like(w) for w in weights))

    def init_tails(self, batch_size: int) -> tuple[Tensor, ...]:
        """Zero tails of the convolutions on q, k and v; none where there are none."""
        return tuple(conv.init_tail(batch_size) for conv in self.convs)

    def weight_bytes(self, batch_size: int) -> int:
        """Return the bytes of one copy of the memory's weights, B H P elements."""
        dtype = accumulation_dtype(self.start[0].dtype)
        return batch_size * sum(w.numel() for w in self.start) * dtype.itemsize

    def flops_per_token(self, written_together: int) -> float:
        """Count projections, convolutions, gates, and the memory: with P weights a head, P1 of them in
        the first layer, and b tokens written together,
        12 P - 2 P1 + 2 b sum(in + out) + 2 b (b + 1) a head.
        Elementwise work is not counted.

        The gradient takes 2 P forward and 2 (P - P1) back, its sums into weights and momentum 4 P,
        the queries' products with both 4 P, the b x b products 2 b (in + out) a layer, the gates'
        coefficients 2 b (b + 1). A token on its own needs one sum and one product of the query:
        8 P - 2 P1."""
        num_weights = sum(w.numel() for w in self.start)
        memory = 8.0 * num_weights - 2.0 * self.start[0].numel()
        if written_together > 1:
            widths = self.num_heads * sum(w.shape[1] + w.shape[2] for w in self.start)
            memory += 4.0 * num_weights + 2.0 * written_together * widths
            memory += 2.0 * self.num_heads * written_together * (written_together + 1)
        linear = sum(layer.weight.numel() for layer in (*self.projections, self.gates))
        return memory + 2.0 * linear + sum(conv.flops_per_token() for conv in self.convs)

    def flops(self, context_tokens: int, phase: Phase) -> float:
        """Count the FLOPs of `step`: over `context_tokens` tokens in prefill, over one token in decode."""
        if phase == "decode":
            return self.flops_per_token(1)
        rest = context_tokens % self.chunk_tokens
        whole = (context_tokens - rest) * self.flops_per_token(self.chunk_tokens)
        return whole + rest * self.flops_per_token(rest)


class MemoryGate(nn.Module):
    """The gating of attention's output y and the memory's m, each normalised with learned weights:
    o = W_o(g * y + (1 - g) * m), g = sigmoid(W_g x + b).

    The paper (section 4.2) leaves the non-linear gating open. This one keeps a path for gradients
    into both branches, where a bare product of them would starve each while the other is young."""

    def __init__(self, *, d_model: int, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(d_model, eps=norm_eps)
        self.memory_norm = RMSNorm(d_model, eps=norm_eps)
        self.gate_proj = nn.Linear(d_model, d_model)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, y: Tensor, m: Tensor) -> Tensor:
        """Gate attention's output and the memory's by the gate's input, (..., D) each -> (..., D)."""
        gate, y, m = self.gate_proj(x).sigmoid(), self.attention_norm(y), self.memory_norm(m)
        return self.o_proj(m + gate * (y - m))

    def flops_per_token(self) -> float:
        """4 D^2."""
        return 2.0 * (self.gate_proj.weight.numel() + self.o_proj.weight.numel())
