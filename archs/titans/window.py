"""Titans that join the memory with a sliding window: as a gate and as a layer (Behrouz et al. 2025,
arXiv 2501.00663, sections 4.2 and 4.3)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable
from typing import NamedTuple

from torch import Tensor, nn

from archs.base import Advance, Flops, Mixer, Phase, decode, decode_at, prefill
from archs.layers import RMSNorm
from archs.sliding_window import SlidingWindowAttention, SlidingWindowState
from archs.titans.lmm import MemoryState, TitansLMM
from archs.titans.memory import MemoryGate

Part = Callable[[Tensor], Tensor]


class TwoPartState(NamedTuple):
    """The states of the memory and of the sliding window."""

    memory: MemoryState
    window: SlidingWindowState
    num_tokens: int


class _MemoryAndWindow(Mixer):
    """The shared part of MAG and MAL: a TitansLMM, a SlidingWindowAttention, and their states."""

    def __init__(
        self,
        *,
        d_model: int,
        num_heads: int,
        window_tokens: int = 64,
        num_persistent_tokens: int = 4,
        memory_depth: int = 2,
        memory_expansion: int = 2,
        chunk_tokens: int = 16,
        use_momentum: bool = True,
        use_decay: bool = True,
        conv_width: int = 4,
        max_step_size: float | None = None,
        rope_theta: float = 10_000.0,
        norm_eps: float = 1e-6,
        memory_implementation: str = "auto",
        attention_implementation: str = "auto",
        attention_step_implementation: str | None = None,
    ) -> None:
        super().__init__()
        self.memory = TitansLMM(
            d_model=d_model,
            num_heads=num_heads,
            memory_depth=memory_depth,
            memory_expansion=memory_expansion,
            chunk_tokens=chunk_tokens,
            use_momentum=use_momentum,
            use_decay=use_decay,
            conv_width=conv_width,
            max_step_size=max_step_size,
            norm_eps=norm_eps,
            implementation=memory_implementation,
        )
        self.window = SlidingWindowAttention(
            d_model=d_model,
            num_heads=num_heads,
            window_tokens=window_tokens,
            num_persistent_tokens=num_persistent_tokens,
            rope_theta=rope_theta,
            conv_width=conv_width,
            implementation=attention_implementation,
            step_implementation=attention_step_implementation,
        )
        self.joint = self._build_joint(d_model=d_model, norm_eps=norm_eps)

    def init_state(self, batch_size: int, max_context_tokens: int) -> TwoPartState:
        memory = self.memory.init_state(batch_size, max_context_tokens)
        return TwoPartState(memory, self.window.init_state(batch_size, max_context_tokens), 0)

    @staticmethod
    @abstractmethod
    def _build_joint(*, d_model: int, norm_eps: float) -> nn.Module:
        """Build the module that stands between or behind the two parts."""

    @abstractmethod
    def _join(self, x: Tensor, memory: Part, window: Part) -> Tensor:
        """Return the mixer's output, with the two parts as functions of their inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return self._join(x, self.memory, self.window)

    def _step(
        self, x: Tensor, state: TwoPartState, num_new: int, advance: Advance
    ) -> tuple[Tensor, TwoPartState]:
        new = {}

        def part(name: str) -> Part:
            def run(x: Tensor) -> Tensor:
                y, new[name] = advance(getattr(self, name), x, getattr(state, name))
                return y

            return run

        y = self._join(x, part("memory"), part("window"))
        return y, TwoPartState(**new, num_tokens=state.num_tokens + num_new)

    def prefill(self, x: Tensor, state: TwoPartState) -> tuple[Tensor, TwoPartState]:
        return self._step(x, state, x.shape[1], prefill)

    def decode(self, x: Tensor, state: TwoPartState) -> tuple[Tensor, TwoPartState]:
        return self._step(x, state, 1, decode)

    def step_kind(self, num_tokens: int) -> Hashable:
        """Return the kinds of both parts' steps."""
        return self.memory.step_kind(num_tokens), self.window.step_kind(num_tokens)

    def decode_at(self, x: Tensor, state: TwoPartState, position: Tensor) -> tuple[Tensor, TwoPartState]:
        return self._step(x, state, 1, decode_at(position))

    def state_bytes_at(self, batch_size: int, context_tokens: int) -> int:
        """Return the sum of both parts'."""
        return sum(part.state_bytes_at(batch_size, context_tokens) for part in (self.memory, self.window))

    def flops(self, context_tokens: int, phase: Phase) -> Flops:
        """Return the sum of both parts', and MAG's gate."""
        total = self.memory.flops(context_tokens, phase).plus(self.window.flops(context_tokens, phase))
        if isinstance(self.joint, MemoryGate):
            num_tokens = context_tokens if phase == "prefill" else 1
            total = total.plus(Flops(matmul=self.joint.flops_per_token()), num_tokens)
        return total


class TitansMAG(_MemoryAndWindow):
    """Memory as a gate (section 4.2): the memory and a sliding window with persistent tokens read
    the same input side by side, and their outputs are gated together (see MemoryGate). Settings: see
    NeuralMemory and SlidingWindowAttention. The persistent tokens are the window's alone."""

    @staticmethod
    def _build_joint(*, d_model: int, norm_eps: float) -> nn.Module:
        return MemoryGate(d_model=d_model, norm_eps=norm_eps)

    def _join(self, x: Tensor, memory: Part, window: Part) -> Tensor:
        return self.joint(x, window(x), memory(x))


class TitansMAL(_MemoryAndWindow):
    """Memory as a layer (section 4.3): the memory, then a sliding window with persistent tokens
    over its output, a residual around each as section 4.4 puts around every part. Settings: see
    NeuralMemory and SlidingWindowAttention. The persistent tokens are the window's alone."""

    @staticmethod
    def _build_joint(*, d_model: int, norm_eps: float) -> nn.Module:
        return RMSNorm(d_model, eps=norm_eps)

    def _join(self, x: Tensor, memory: Part, window: Part) -> Tensor:
        y = memory(x)
        return y + window(self.joint(x + y))
