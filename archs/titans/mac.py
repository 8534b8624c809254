"""Titans with the memory as a context (Behrouz et al. 2025, arXiv 2501.00663, section 4.1)."""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from archs.base import Flops, Mixer, Phase
from archs.layers import CausalConvolution, RMSNorm, rotary_table, rotate
from archs.ops.neural_memory import NeuralMemoryState, read
from archs.ops.segment_attention import OPERATION, segment_attention
from archs.titans.memory import MemoryGate, NeuralMemory


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


class _Piece(NamedTuple):
    """C tokens of one segment, with what follows from the input alone and is computed once for all
    segments of a call: x (B, C, D); the retrieval's q, and attention's q and k, rotated, and v,
    (B, C, H, K) each; the rotation's cosines and sines (1, C, 1, K / 2)."""

    x: Tensor
    retrieval_q: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor


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
    attention_implementation: of archs.ops.segment_attention.
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
        self.retrieved_norm = RMSNorm(self.head_width, eps=norm_eps)
        self.norm = RMSNorm(d_model, eps=norm_eps)
        self.gate = MemoryGate(d_model=d_model, norm_eps=norm_eps)

    def _pieces(self, x: Tensor, state: MACState) -> list[_Piece]:
        """Read the next tokens (B, T, D), cut where segments end. Updates the tails of attention and of the
        retrieval in place."""
        num_tokens, offset = x.shape[1], state.num_tokens % self.segment_tokens
        positions = torch.arange(offset, offset + num_tokens, device=x.device) % self.segment_tokens
        cuts = (0, *range(self.segment_tokens - offset, num_tokens, self.segment_tokens), num_tokens)
        lengths = [last - first for first, last in itertools.pairwise(cuts)]
        # split, because the backward pass of slices takes the whole length for every piece.
        parts = (t.split(lengths, dim=1) for t in self._piece(x, state, positions))
        return [_Piece(*part) for part in zip(*parts, strict=True)]

    def _piece(self, x: Tensor, state: MACState, positions: Tensor) -> _Piece:
        """Read the next tokens (B, T, D), at `positions` (T,) of their segments. Updates tails as
        `_pieces`."""
        tails = state.tails[:4] or (None,) * 4
        retrieval_q = self.memory.project(0, x, tails[3])
        q, k, v = (projection(x) for projection in self.projections)
        if self.convs:
            q, k, v = (
                c.prefill(t, tail)[0] for c, t, tail in zip(self.convs, (q, k, v), tails, strict=False)
            )
        q, k, v = (t.unflatten(-1, (-1, self.head_width)) for t in (q, k, v))
        table = rotary_table(positions, self.head_width, theta=self.rope_theta, dtype=q.dtype)
        return _Piece(x, retrieval_q, rotate(q, table), rotate(k, table), v, *(t[None] for t in table))

    def _segment(
        self, piece: _Piece, past: tuple[Tensor, Tensor], state: MACState
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], MACState]:
        """Read tokens of the open segment, whose keys and values so far are `past` -> what is written and
        the memory's answer, (B, C, D) each; the tokens' keys and values (B, 2 C, H, K), which the
        caller adds to the state's; the state. Updates the memory's tails in place."""
        new = self._entries(piece, state)
        keys, values = (torch.cat(parts, dim=1) for parts in zip(past, new, strict=True))
        mask = None
        if piece.q.shape[1] > 1:
            num_persistent = self.num_persistent_tokens  # their keys count as tokens before the first
            token = torch.arange(-num_persistent, keys.shape[1] - num_persistent, device=keys.device) // 2
            mask = token <= token[-2 * piece.q.shape[1] :: 2, None]
        pair, state = self._write(piece, self._attend(piece.q, keys, values, mask), state)
        return pair, new, state

    def _entries(self, piece: _Piece, state: MACState) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, 2 C, H, K): every token's retrieved and its own."""
        retrieved = self.retrieved_norm(read(piece.retrieval_q, state.before_segment)).flatten(2)
        retrieved_k, retrieved_v = (
            projection(retrieved).unflatten(-1, (-1, self.head_width)) for projection in self.projections[1:]
        )
        retrieved_k = rotate(retrieved_k, (piece.cos, piece.sin))
        keys = torch.stack((retrieved_k, piece.k), dim=2).flatten(1, 2)
        return keys, torch.stack((retrieved_v, piece.v), dim=2).flatten(1, 2)

    def _write(
        self, piece: _Piece, attended: Tensor, state: MACState
    ) -> tuple[tuple[Tensor, Tensor], MACState]:
        """Finish `_segment`, once attention has answered, (B, C, D)."""
        y = self.norm(piece.x + attended)
        position = state.num_tokens % self.memory.chunk_tokens
        answer, memory = self.memory.step(y, state.memory, position, state.tails[4:])
        state = state._replace(memory=memory, num_tokens=state.num_tokens + y.shape[1])
        return (y, answer), state

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Attend with queries (B, C, H, K) to the keys (B, S, H, K) where mask (C, S) is True -> (B, C,
        D)."""
        y = segment_attention(q, keys, values, mask, implementation=self.implementation)
        return self.o_proj(y.flatten(2))

    def _output(self, answered: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Gate each piece's written tokens by the memory's answer; pieces in order -> (B, T, D)."""
        y, answer = (torch.cat(parts, dim=1) for parts in zip(*answered, strict=True))
        return self.gate(y, y, answer)

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
        state, answered = self._start(x.shape[0], *past), []
        for piece in self._pieces(x, state):
            state = state._replace(before_segment=state.memory.weights)
            pair, _, state = self._segment(piece, past, state)
            answered.append(pair)
        return self._output(answered)

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
        answered = []
        for piece in self._pieces(x, state):
            offset = state.num_tokens % self.segment_tokens
            if offset == 0:
                state = state._replace(before_segment=tuple(w.clone() for w in state.memory.weights))
            used = self.num_persistent_tokens + 2 * offset
            past = (state.keys[:, :used], state.values[:, :used])
            pair, new, state = self._segment(piece, past, state)
            for buffer, entries in zip(state[:2], new, strict=True):
                buffer[:, used : used + entries.shape[1]] = entries
            answered.append(pair)
        return self._output(answered), state

    def decode(self, x: Tensor, state: MACState) -> tuple[Tensor, MACState]:
        y, state = self.prefill(x[:, None], state)
        return y[:, 0], state

    def step_kind(self, num_tokens: int) -> Hashable:
        """Return whether the step opens a segment, and its place in the memory's chunk."""
        return num_tokens % self.segment_tokens == 0, num_tokens % self.memory.chunk_tokens

    def decode_at(self, x: Tensor, state: MACState, position: Tensor) -> tuple[Tensor, MACState]:
        offset = position % self.segment_tokens
        if state.num_tokens % self.segment_tokens == 0:
            for before, now in zip(state.before_segment, state.memory.weights, strict=True):
                before.copy_(now)
        piece = self._piece(x[:, None], state, offset)
        used = self.num_persistent_tokens + 2 * offset
        slots = used + torch.arange(2, device=x.device)
        for buffer, entries in zip(state[:2], self._entries(piece, state), strict=True):
            buffer.index_copy_(1, slots, entries.to(buffer.dtype))
        seen = torch.arange(state.keys.shape[1], device=x.device) < used + 2
        attended = self._attend(piece.q, state.keys, state.values, seen[None])
        pair, state = self._write(piece, attended, state)
        return self._output([pair])[:, 0], state

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
        """Count per token: NeuralMemory's, the retrieval's 2 P and 2 D^2, attention's projections 12 D^2
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
