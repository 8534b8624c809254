"""Titans LMM: the neural memory as a mixer of its own."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs.base import Flops, Mixer, Phase
from archs.layers import RMSNorm
from archs.ops.neural_memory import NeuralMemoryState
from archs.titans.memory import NeuralMemory


class MemoryState(NamedTuple):
    """memory: the op's state, (B, H, in, out) a layer; tails (B, D, W) of the convolutions."""

    memory: NeuralMemoryState
    tails: tuple[Tensor, ...]
    num_tokens: int


class TitansLMM(Mixer):
    """The long-term memory alone (section 4.3: "LMM", no attention): o = W_o(norm(y) * silu(W_g x))
    with y the memory's answer, normalised in every head, and the gating that section 4.4 asks for.
    See NeuralMemory for the settings.
    """

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
        norm_eps: float = 1e-6,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        self.memory = NeuralMemory(
            d_model=d_model,
            num_heads=num_heads,
            memory_depth=memory_depth,
            memory_expansion=memory_expansion,
            chunk_tokens=chunk_tokens,
            use_momentum=use_momentum,
            use_decay=use_decay,
            conv_width=conv_width,
            max_step_size=max_step_size,
            implementation=implementation,
        )
        self.norm = RMSNorm(d_model // num_heads, eps=norm_eps)
        self.gate_proj = nn.Linear(d_model, d_model, bias=False)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    def _output(self, y: Tensor, x: Tensor) -> Tensor:
        y = self.norm(y.unflatten(-1, (self.memory.num_heads, -1))).flatten(-2)
        return self.o_proj(y * F.silu(self.gate_proj(x)))

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.memory.step(x, self.memory.init_memory(x.shape[0]), 0, None)
        return self._output(y, x)

    def init_state(self, batch_size: int, max_context_tokens: int) -> MemoryState:
        del max_context_tokens
        with torch.no_grad():
            memory = self.memory.init_memory(batch_size)
        return MemoryState(memory, self.memory.init_tails(batch_size), 0)

    def prefill(self, x: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
        position = state.num_tokens % self.memory.chunk_tokens
        y, memory = self.memory.step(x, state.memory, position, state.tails)
        return self._output(y, x), MemoryState(memory, state.tails, state.num_tokens + x.shape[1])

    def decode(self, x: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
        y, state = self.prefill(x[:, None], state)
        return y[:, 0], state

    def step_kind(self, num_tokens: int) -> int:
        """Return the place in the chunk, whose first and last tokens' steps keep the weights."""
        return num_tokens % self.memory.chunk_tokens

    def state_bytes_at(self, batch_size: int, context_tokens: int) -> int:
        """3 B H P elements (weights at the chunk's start, weights now, momentum), and the tails."""
        del context_tokens
        tails = sum(conv.tail_bytes(batch_size) for conv in self.memory.convs)
        return 3 * self.memory.weight_bytes(batch_size) + tails

    def flops(self, context_tokens: int, phase: Phase) -> Flops:
        """Count NeuralMemory's, and 4 D^2 per token for gate and output."""
        num_tokens = context_tokens if phase == "prefill" else 1
        outer = 2.0 * (self.gate_proj.weight.numel() + self.o_proj.weight.numel())
        return Flops(matmul=self.memory.flops(context_tokens, phase) + num_tokens * outer)
