"""Softmax attention over a sliding window, with a state that does not grow with the context."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs.base import Flops, Mixer, Phase
from archs.layers import CausalConvolution, rotary
from archs.ops.attention import OPERATION, STEP_OPERATION, attention, attention_step


class SlidingWindowState(NamedTuple):
    """keys, values (B, P + R, H', K): the P persistent ones, then a ring of the last R tokens, in
    which token t lies in slot t modulo R; tails (B, D, W) of the convolutions on q, k, v."""

    keys: Tensor
    values: Tensor
    tails: tuple[Tensor, ...]
    num_tokens: int


class SlidingWindowAttention(Mixer):
    """Causal attention to the last `window_tokens` tokens, itself included (Beltagy et al. 2020,
    arXiv 2004.05150), and to learned persistent keys and values that every token sees.

    The persistent tokens are Titans' (arXiv 2501.00663, section 3.3), learned after the key and
    value projections instead of before them: the same function of fewer products. With them,
    rotary positions turn the first half of a head's width only and the persistent keys live in the
    other half, so that their weight does not depend on how far into the text the query stands.

    head_width: K, default d_model / num_heads.
    conv_width: 0, or the width of causal convolutions on q, k and v before the rotation.
    step_implementation: of attention_step, which `decode_at` calls; the name of `implementation` where None.
    Raises ValueError where heads do not divide the width or a size is not positive.
    """

    operation, step_operation = OPERATION, STEP_OPERATION

    def __init__(
        self,
        *,
        d_model: int,
        num_heads: int,
        window_tokens: int,
        num_kv_heads: int | None = None,
        head_width: int | None = None,
        num_persistent_tokens: int = 0,
        rope_theta: float = 10_000.0,
        conv_width: int = 0,
        implementation: str = "auto",
        step_implementation: str | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        multiple = 4 if num_persistent_tokens else 2
        if head_width is None:
            if num_heads < 1 or d_model % num_heads or (d_model // num_heads) % multiple:
                raise ValueError(
                    f"num_heads={num_heads} must divide d_model={d_model} into heads whose width is a "
                    f"multiple of {multiple}"
                )
            head_width = d_model // num_heads
        if num_heads < 1 or head_width < 1 or head_width % multiple:
            raise ValueError(
                f"num_heads={num_heads} must be positive and head_width={head_width} a positive multiple of "
                f"{multiple}"
            )
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads={num_kv_heads} must divide num_heads={num_heads}")
        if window_tokens < 1:
            raise ValueError(f"window_tokens={window_tokens} must be positive")
        if num_persistent_tokens < 0:
            raise ValueError(f"num_persistent_tokens={num_persistent_tokens} must not be negative")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_width = head_width
        self.rotary_width = self.head_width // 2 if num_persistent_tokens else self.head_width
        self.window_tokens, self.num_persistent_tokens = window_tokens, num_persistent_tokens
        self.rope_theta = rope_theta
        self.implementation, self.step_implementation = implementation, step_implementation
        q_width, kv_width = num_heads * head_width, num_kv_heads * head_width
        self.q_proj = nn.Linear(d_model, q_width, bias=False)
        self.k_proj = nn.Linear(d_model, kv_width, bias=False)
        self.v_proj = nn.Linear(d_model, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, d_model, bias=False)
        widths = (q_width, kv_width, kv_width) if conv_width else ()
        self.convs = nn.ModuleList(CausalConvolution(d_model=width, width=conv_width) for width in widths)
        shape = (num_persistent_tokens, num_kv_heads, self.head_width)
        still_shape = (*shape[:2], self.head_width - self.rotary_width)
        has_persistent = num_persistent_tokens > 0
        self.persistent_keys = nn.Parameter(torch.randn(still_shape)) if has_persistent else None
        self.persistent_values = nn.Parameter(0.02 * torch.randn(shape)) if has_persistent else None

    def _persistent(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Return the persistent keys and values, (B, P, H', K) each."""
        if self.persistent_keys is None or self.persistent_values is None:
            empty = self.k_proj.weight.new_empty(batch_size, 0, self.num_kv_heads, self.head_width)
            return empty, empty
        keys = F.pad(self.persistent_keys, (self.rotary_width, 0))
        return keys.expand(batch_size, -1, -1, -1), self.persistent_values.expand(batch_size, -1, -1, -1)

    def _heads(self, qkv: list[Tensor], positions: Tensor) -> list[Tensor]:
        """(B, C, ...) each at positions (C,) -> rotated q (B, C, H, K), rotated k and v (B, C, H', K)."""
        q, k, v = (t.unflatten(-1, (-1, self.head_width)) for t in qkv)
        return [self._rotate(q, positions), self._rotate(k, positions), v]

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        if self.rotary_width == self.head_width:
            return rotary(x, positions, theta=self.rope_theta)
        moving, still = x.split((self.rotary_width, self.head_width - self.rotary_width), dim=-1)
        return torch.cat((rotary(moving, positions, theta=self.rope_theta), still), dim=-1)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, window_tokens: int | None) -> Tensor:
        """Attend with queries (B, C, H, K) to persistent keys, then the text's in order -> (B, C, D)."""
        y = attention(
            q,
            keys,
            values,
            window_tokens=window_tokens,
            num_sink_tokens=0 if window_tokens is None else self.num_persistent_tokens,
            implementation=self.implementation,
        )
        return self.o_proj(y.flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        qkv = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        if self.convs:
            qkv = [conv(t) for conv, t in zip(self.convs, qkv, strict=True)]
        q, k, v = self._heads(qkv, torch.arange(x.shape[1], device=x.device))
        if self.num_persistent_tokens:
            keys, values = self._persistent(x.shape[0])
            k, v = torch.cat((keys, k), dim=1), torch.cat((values, v), dim=1)
        return self._attend(q, k, v, self.window_tokens)

    def _num_slots(self, max_context_tokens: int) -> int:
        return min(self.window_tokens, max_context_tokens)

    def init_state(self, batch_size: int, max_context_tokens: int) -> SlidingWindowState:
        num_keys = self.num_persistent_tokens + self._num_slots(max_context_tokens)
        shape = (batch_size, num_keys, self.num_kv_heads, self.head_width)
        keys, values = (self.k_proj.weight.new_zeros(shape) for _ in range(2))
        with torch.no_grad():
            for buffer, persistent in zip((keys, values), self._persistent(batch_size), strict=True):
                buffer[:, : self.num_persistent_tokens] = persistent
        return SlidingWindowState(keys, values, tuple(c.init_tail(batch_size) for c in self.convs), 0)

    def prefill(self, x: Tensor, state: SlidingWindowState) -> tuple[Tensor, SlidingWindowState]:
        positions = torch.arange(state.num_tokens, state.num_tokens + x.shape[1], device=x.device)
        q, k, v, slots = self._enter(x, state, positions)
        first, num_persistent = state.num_tokens, self.num_persistent_tokens
        past = torch.arange(max(0, first - slots), first, device=x.device) % slots + num_persistent
        seen = torch.cat((torch.arange(num_persistent, device=x.device), past))
        keys = torch.cat((state.keys[:, seen], k), dim=1)
        values = torch.cat((state.values[:, seen], v), dim=1)
        y = self._attend(q, keys, values, self.window_tokens)
        stop = first + x.shape[1]
        num_kept = min(x.shape[1], slots)
        kept = torch.arange(stop - num_kept, stop, device=x.device) % slots + num_persistent
        k, v = (t[:, -num_kept:].to(state.keys.dtype) for t in (k, v))  # under autocast they differ
        state.keys[:, kept], state.values[:, kept] = k, v
        return y, state._replace(num_tokens=stop)

    def decode(self, x: Tensor, state: SlidingWindowState) -> tuple[Tensor, SlidingWindowState]:
        position = torch.arange(state.num_tokens, state.num_tokens + 1, device=x.device)
        q, k, v, slots = self._enter(x[:, None], state, position)
        slot = self.num_persistent_tokens + state.num_tokens % slots
        state.keys[:, slot], state.values[:, slot] = k[:, 0], v[:, 0]
        # The ring holds the window and no more: the query sees all of it, in whatever order.
        num_seen = self.num_persistent_tokens + min(state.num_tokens + 1, slots)
        y = self._attend(q, state.keys[:, :num_seen], state.values[:, :num_seen], None)
        return y[:, 0], state._replace(num_tokens=state.num_tokens + 1)

    def step_kind(self, num_tokens: int) -> int:
        """Return 0: every step does the same work."""
        del num_tokens
        return 0

    def decode_at(
        self, x: Tensor, state: SlidingWindowState, position: Tensor
    ) -> tuple[Tensor, SlidingWindowState]:
        q, k, v, slots = self._enter(x[:, None], state, position)
        slot = self.num_persistent_tokens + position % slots
        state.keys.index_copy_(1, slot, k.to(state.keys.dtype))
        state.values.index_copy_(1, slot, v.to(state.values.dtype))
        num_seen = self.num_persistent_tokens + (position + 1).clamp(max=slots)
        implementation = self.step_implementation or self.implementation
        y = attention_step(q[:, 0], state.keys, state.values, num_seen, implementation=implementation)
        return self.o_proj(y.flatten(1)), state._replace(num_tokens=state.num_tokens + 1)

    def _enter(
        self, x: Tensor, state: SlidingWindowState, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """q, k, v of the next tokens (B, C, D) at positions (C,), and the number of slots in the ring.

        Raises ValueError where a ring shorter than the window would run over."""
        slots, stop = state.keys.shape[1] - self.num_persistent_tokens, state.num_tokens + x.shape[1]
        if slots < min(self.window_tokens, stop):
            raise ValueError(
                f"the state has room for {slots} tokens and was given {stop}; "
                "ask init_state for a larger max_context_tokens"
            )
        qkv = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        if self.convs:  # the tails are updated in place
            qkv = [
                conv.prefill(t, tail)[0] for conv, t, tail in zip(self.convs, qkv, state.tails, strict=True)
            ]
        return *self._heads(qkv, positions), slots

    def state_bytes_at(self, batch_size: int, context_tokens: int) -> int:
        """Return the bytes of keys and values of the persistent tokens and the window, and the tails."""
        weight = self.k_proj.weight
        num_keys = self.num_persistent_tokens + self._num_slots(context_tokens)
        cache = 2 * batch_size * num_keys * weight.shape[0] * weight.element_size()
        return cache + sum(conv.tail_bytes(batch_size) for conv in self.convs)

    def flops(self, context_tokens: int, phase: Phase) -> Flops:
        """Count 2 (2 D H K + 2 D d_kv) per token for projections; 4 H K per query-key pair, at most
        window_tokens + num_persistent_tokens pairs a token."""
        window = self._num_slots(context_tokens)
        if phase == "prefill":
            num_queries = context_tokens
            pairs = window * (window + 1) / 2 + (context_tokens - window) * window
            num_keys = context_tokens
        else:
            num_queries, pairs, num_keys = 1, window, window
        q_width = self.q_proj.weight.shape[0]
        weights = sum(p.weight.numel() for p in (self.q_proj, self.k_proj, self.v_proj, self.o_proj))
        per_token = 2.0 * weights + sum(conv.flops_per_token() for conv in self.convs)
        persistent = num_queries * self.num_persistent_tokens
        return Flops(
            matmul=num_queries * per_token,
            attention=4.0 * q_width * (pairs + persistent),
            attention_square=4.0 * q_width * (num_queries * num_keys + persistent),
        )
