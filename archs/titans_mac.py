"""Titans with the memory as a context (Behrouz et al. 2025, arXiv 2501.00663, section 4.1)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs.base import Flops, Mixer, Phase
from archs.layers import CausalConvolution, rotary
from archs.ops.neural_memory import NeuralMemoryState, read
from archs.ops.operation import Implementation, Operation
from archs.titans import MemoryGate, NeuralMemory

#: Two keys a token do not fit the causal rule of archs.ops.attention; the names are the same.
OPERATION = Operation(
    name="segment_attention",
    implementations={
        "plain": Implementation(target="archs.titans_mac:plain_attention"),
        "sdpa": Implementation(target="torch.nn.functional:scaled_dot_product_attention"),
    },
    auto={"cpu": ["sdpa"], "cuda": ["sdpa"]},
)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k' / sqrt(K)) v: (B, H, C, K), (B, H, S, K) twice -> (B, H, C, K), over the keys
    where mask (C, S) is True, all of them where it is None."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ v


class MACState(NamedTuple):
    """keys, values (B, P + 2 G', H, K): the P persistent ones, then for every token of the open
    segment, which has room for G' tokens, the retrieved and its own.

    memory: the op's state. before_segment: the memory's weights before the open segment, a matrix
    (B, H, in, out) a layer. tails (B, D, W): attention's q, k, v; the retrieval's q; the memory's
    q, k, v."""

    keys: Tensor
    values: Tensor
    memory: NeuralMemoryState
    before_segment: tuple[Tensor, ...]
    tails: tuple[Tensor, ...]
    num_tokens: int


class TitansMAC(Mixer):
    """Memory as a context (section 4.1), in a form that no token of the future can enter.

    In a segment of G tokens, with M the memory's weights before it: h_j = M(q(x_j)) is retrieved;
    token i attends to learned persistent tokens and to h_j and x_j of the segment's tokens j <= i,
    giving y_i; then y_i is written, M_i, and the output is y_i gated by M_i(y_i).

    Departures from the paper: attention is causal in the retrieved tokens too, and M_i has seen the
    tokens up to i instead of the whole segment, since both would show a token its future. The
    residual that the paper puts around every part is here around attention, so that y_i holds x_i.
    Persistent tokens are learned as keys and values, after the projections. Sizes and rotary
    positions (counted from the segment's start) are this project's choice.

    segment_tokens: a multiple of chunk_tokens, else ValueError. Memory settings: see NeuralMemory.
    attention_implementation: "sdpa" or "plain"; no other name of archs.ops.attention runs here, and
    asking for one raises ImplementationUnavailable.
    """

    operation = OPERATION

    def __init__(
        self,
        *,
        d_model: int,
        num_heads: int,
        segment_tokens: int = 64,
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
            implementation=memory_implementation,
        )
        self.head_width = d_model // num_heads
        if self.head_width % 2:
            raise ValueError(f"num_heads={num_heads} must divide d_model={d_model} into even widths")
        if segment_tokens < 1 or segment_tokens % chunk_tokens:
            raise ValueError(
                f"segment_tokens={segment_tokens} must be a multiple of chunk_tokens={chunk_tokens}"
            )
        if num_persistent_tokens < 0:
            raise ValueError(f"num_persistent_tokens={num_persistent_tokens} must not be negative")
        self.segment_tokens, self.num_persistent_tokens = segment_tokens, num_persistent_tokens
        self.rope_theta, self.implementation = rope_theta, attention_implementation
        self.projections = nn.ModuleList(nn.Linear(d_model, d_model, bias=False) for _ in range(3))
        self.convs = nn.ModuleList(
            CausalConvolution(d_model=d_model, width=conv_width) for _ in range(3 if conv_width else 0)
        )
        self.o_proj = nn.Linear(d_model, d_model, bias=False)
        shape = (num_persistent_tokens, num_heads, self.head_width)
        self.persistent_keys = nn.Parameter(torch.randn(shape))
        self.persistent_values = nn.Parameter(0.02 * torch.randn(shape))
        self.retrieved_norm = nn.RMSNorm(self.head_width, eps=norm_eps)
        self.norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.gate = MemoryGate(d_model=d_model, norm_eps=norm_eps)

    def _segment(
        self, x: Tensor, past: tuple[Tensor, Tensor], state: MACState
    ) -> tuple[Tensor, tuple[Tensor, Tensor], NeuralMemoryState]:
        """Tokens (B, C, D) of the open segment, whose keys and values so far are `past` -> output
        (B, C, D), their own keys and values (B, 2 C, H, K), memory. Updates the tails in place."""
        offset = state.num_tokens % self.segment_tokens
        tails = state.tails or (None,) * 7
        retrieved = read(self.memory.project(0, x, tails[3]), state.before_segment)
        retrieved = self.retrieved_norm(retrieved).flatten(2)
        q, k, v = (projection(x) for projection in self.projections)
        if self.convs:
            q, k, v = (
                c.prefill(t, tail)[0] for c, t, tail in zip(self.convs, (q, k, v), tails, strict=False)
            )
        keys, values = (
            torch.stack((projection(retrieved), own), dim=2)
            for projection, own in zip(self.projections[1:], (k, v), strict=True)
        )  # (B, C, 2, D)
        positions = torch.arange(offset, offset + x.shape[1], device=x.device)
        q = rotary(q.unflatten(-1, (-1, self.head_width)), positions, theta=self.rope_theta)
        keys = keys.flatten(1, 2).unflatten(-1, (-1, self.head_width))
        keys = rotary(keys, positions.repeat_interleave(2), theta=self.rope_theta)
        values = values.flatten(1, 2).unflatten(-1, (-1, self.head_width))
        attended = self._attend(
            q, torch.cat((past[0], keys), dim=1), torch.cat((past[1], values), dim=1), positions
        )
        y = self.norm(x + attended)
        position = state.num_tokens % self.memory.chunk_tokens
        answer, memory = self.memory.step(y, state.memory, position, state.tails[4:])
        return self.gate(y, y, answer), (keys, values), memory

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """Queries (B, C, H, K) at `positions` of the segment -> (B, C, D)."""
        mask = None
        if q.shape[1] > 1:
            token = torch.arange(keys.shape[1] - self.num_persistent_tokens, device=q.device) // 2
            mask = F.pad(token <= positions[:, None], (self.num_persistent_tokens, 0), value=True)
        q, keys, values = (t.transpose(1, 2) for t in (q, keys, values))
        y = OPERATION.function(self.implementation, q.device)(q, keys, values, mask)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def _persistent(self, batch_size: int) -> tuple[Tensor, Tensor]:
        keys, values = (
            t.expand(batch_size, *t.shape) for t in (self.persistent_keys, self.persistent_values)
        )
        return keys, values

    def _start(self, batch_size: int, keys: Tensor, values: Tensor) -> MACState:
        memory = self.memory.init_memory(batch_size)
        convs = (*self.convs, *self.memory.convs[:1], *self.memory.convs)
        tails = tuple(conv.init_tail(batch_size) for conv in convs)
        return MACState(keys, values, memory, tuple(w.clone() for w in memory.weights), tails, 0)

    def forward(self, x: Tensor) -> Tensor:
        past = self._persistent(x.shape[0])
        state, outputs = self._start(x.shape[0], *past), []
        for piece in x.split(self.segment_tokens, dim=1):
            state = state._replace(before_segment=state.memory.weights)
            y, _, memory = self._segment(piece, past, state)
            outputs.append(y)
            state = state._replace(memory=memory, num_tokens=state.num_tokens + piece.shape[1])
        return torch.cat(outputs, dim=1)

    def _num_keys(self, max_context_tokens: int) -> int:
        return self.num_persistent_tokens + 2 * min(self.segment_tokens, max_context_tokens)

    def init_state(self, batch_size: int, max_context_tokens: int) -> MACState:
        weight = self.persistent_keys
        shape = (batch_size, self._num_keys(max_context_tokens), *weight.shape[1:])
        with torch.no_grad():
            state = self._start(batch_size, weight.new_zeros(shape), weight.new_zeros(shape))
            for buffer, persistent in zip(state[:2], self._persistent(batch_size), strict=True):
                buffer[:, : self.num_persistent_tokens] = persistent
        return state

    def prefill(self, x: Tensor, state: MACState) -> tuple[Tensor, MACState]:
        num_slots = (state.keys.shape[1] - self.num_persistent_tokens) // 2
        stop = state.num_tokens + x.shape[1]
        if num_slots < self.segment_tokens and stop > num_slots:
            raise ValueError(
                f"the state has room for {num_slots} tokens and was given {stop}; "
                "ask init_state for a larger max_context_tokens"
            )
        outputs, first = [], 0
        while first < x.shape[1]:
            offset = state.num_tokens % self.segment_tokens
            piece = x[:, first : first + self.segment_tokens - offset]
            if offset == 0:
                state = state._replace(before_segment=tuple(w.clone() for w in state.memory.weights))
            used = self.num_persistent_tokens + 2 * offset
            past = (state.keys[:, :used], state.values[:, :used])
            y, new, memory = self._segment(piece, past, state)
            for buffer, entries in zip(state[:2], new, strict=True):
                buffer[:, used : used + entries.shape[1]] = entries
            outputs.append(y)
            first += piece.shape[1]
            state = state._replace(memory=memory, num_tokens=state.num_tokens + piece.shape[1])
        return torch.cat(outputs, dim=1), state

    def decode(self, x: Tensor, state: MACState) -> tuple[Tensor, MACState]:
        y, state = self.prefill(x[:, None], state)
        return y[:, 0], state

    def state_bytes_at(self, batch_size: int, context_tokens: int) -> int:
        """Four copies of the memory's weights (before the segment, before the chunk, now, and the
        momentum), the segment's keys and values, seven convolution tails."""
        weight = self.persistent_keys
        num_keys = self._num_keys(context_tokens)
        cache = 2 * batch_size * num_keys * weight.shape[1] * weight.shape[2] * weight.element_size()
        convs = (*self.convs, *self.memory.convs[:1], *self.memory.convs)
        tails = sum(conv.tail_bytes(batch_size) for conv in convs)
        return 4 * self.memory.weight_bytes(batch_size) + cache + tails

    def flops(self, context_tokens: int, phase: Phase) -> Flops:
        """A token: NeuralMemory's, the retrieval's 2 P and 2 D^2, attention's projections 12 D^2
        (keys and values twice), the gate 4 D^2; 4 D a query-key pair, of which token i of a
        segment has P + 2 i. A decode step is the last of the segment that `context_tokens` ends in."""
        num_tokens = context_tokens if phase == "prefill" else 1
        square = self.o_proj.weight.numel()
        per_token = 2.0 * sum(w.numel() for w in self.memory.start) + 14.0 * square
        per_token += sum(c.flops_per_token() for c in (*self.convs, *self.memory.convs[:1]))
        per_token += self.gate.flops_per_token()
        segment, persistent = self.segment_tokens, self.num_persistent_tokens
        num_segments, rest = divmod(context_tokens, segment)
        if phase == "prefill":
            pairs = num_segments * segment * (segment + 1) + rest * (rest + 1)
            dense = 2 * (num_segments * segment**2 + rest**2)
        else:
            pairs = dense = 2 * (rest or segment)
        width = 4.0 * self.o_proj.weight.shape[0]
        return Flops(
            matmul=self.memory.flops(context_tokens, phase) + num_tokens * per_token,
            attention=width * (pairs + num_tokens * persistent),
            attention_square=width * (dense + num_tokens * persistent),
        )
