"""Softmax attention as a mixer: rotary positions, grouped-query heads, optional convolutions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from archs.base import Flops, Mixer, Phase
from archs.layers import CausalConvolution, rotary_table, rotate
from archs.ops.attention import OPERATION, STEP_OPERATION, attention, attention_step


class AttentionState(NamedTuple):
    """keys, values (B, H', S, K) with S slots, a head's in one piece; tails (B, D, W) of the convolutions on
    q, k, v."""

    keys: Tensor
    values: Tensor
    tails: tuple[Tensor, ...]
    num_tokens: int


class Attention(Mixer):
    """Causal self-attention (Vaswani et al. 2017) with rotary positions (arXiv 2104.09864) and
    grouped-query heads (arXiv 2305.13245).

    head_width: K, default d_model / num_heads.
    use_bias:   biases of the projections to q, k and v. use_output_bias: of the one back to d_model.
    conv_width: 0, or the width of depthwise causal convolutions on q, k and v before the rotation.
    step_implementation: of attention_step, which `decode_at` calls; the name of `implementation` where None.
    Raises ValueError where heads do not divide the width, or head_width is not positive and even.
    """

    operation, step_operation = OPERATION, STEP_OPERATION

    def __init__(
        self,
        *,
        d_model: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_width: int | None = None,
        use_bias: bool = False,
        use_output_bias: bool = False,
        rope_theta: float = 10_000.0,
        conv_width: int = 0,
        implementation: str = "auto",
        step_implementation: str | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1:
            raise ValueError(f"num_heads={num_heads} must be positive")
        if head_width is None:
            if d_model % num_heads or (d_model // num_heads) % 2:
                raise ValueError(
                    f"num_heads={num_heads} must divide d_model={d_model} into heads of even width"
                )
            head_width = d_model // num_heads
        if head_width < 2 or head_width % 2:
            raise ValueError(f"head_width={head_width} must be positive and even")
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads={num_kv_heads} must divide num_heads={num_heads}")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_width = head_width
        self.rope_theta = rope_theta
        self.implementation, self.step_implementation = implementation, step_implementation
        self.kv_width = num_kv_heads * head_width
        q_width = num_heads * head_width
        self.q_proj = nn.Linear(d_model, q_width, bias=use_bias)
        self.k_proj = nn.Linear(d_model, self.kv_width, bias=use_bias)
        self.v_proj = nn.Linear(d_model, self.kv_width, bias=use_bias)
        self.o_proj = nn.Linear(q_width, d_model, bias=use_output_bias)
        widths = (q_width, self.kv_width, self.kv_width) if conv_width else ()
        self.convs = nn.ModuleList(CausalConvolution(d_model=width, width=conv_width) for width in widths)

    def _project(self, x: Tensor) -> list[Tensor]:
        return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]

    def _project_next(self, x: Tensor, state: AttentionState) -> list[Tensor]:
        """Project as `_project` and pass the convolutions, whose tails are updated in place."""
        qkv = self._project(x)
        if not self.convs:
            return qkv
        return [conv.prefill(t, tail)[0] for conv, t, tail in zip(self.convs, qkv, state.tails, strict=True)]

    def _heads(self, qkv: list[Tensor], positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, ...) each at positions (C,) -> rotated q (B, C, H, K), rotated k and v (B, C, H', K)."""
        q, k, v = (t.unflatten(-1, (-1, self.head_width)) for t in qkv)
        table = rotary_table(positions, self.head_width, theta=self.rope_theta, dtype=q.dtype)
        return rotate(q, table), rotate(k, table), v

    def forward(self, x: Tensor) -> Tensor:
        qkv = self._project(x)
        if self.convs:
            qkv = [conv(t) for conv, t in zip(self.convs, qkv, strict=True)]
        q, k, v = self._heads(qkv, torch.arange(x.shape[1], device=x.device))
        return self.o_proj(attention(q, k, v, implementation=self.implementation).flatten(2))

    def init_state(self, batch_size: int, max_context_tokens: int) -> AttentionState:
        weight = self.k_proj.weight
        shape = (batch_size, self.num_kv_heads, max_context_tokens, self.head_width)
        tails = tuple(conv.init_tail(batch_size) for conv in self.convs)
        return AttentionState(weight.new_zeros(shape), weight.new_zeros(shape), tails, 0)

    def prefill(self, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        first, stop = state.num_tokens, state.num_tokens + x.shape[1]
        if stop > state.keys.shape[2]:
            raise ValueError(
                f"the state has room for {state.keys.shape[2]} tokens and was given {stop}; "
                "ask init_state for a larger max_context_tokens"
            )
        positions = torch.arange(first, stop, device=x.device)
        q, k, v = self._heads(self._project_next(x, state), positions)
        keys, values = (room.transpose(1, 2) for room in (state.keys, state.values))  # (B, S, H', K)
        keys[:, first:stop], values[:, first:stop] = k, v
        y = attention(q, keys[:, :stop], values[:, :stop], implementation=self.implementation)
        return self.o_proj(y.flatten(2)), state._replace(num_tokens=stop)

    def decode(self, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        y, state = self.prefill(x[:, None], state)
        return y[:, 0], state

    def step_kind(self, num_tokens: int) -> int:
        """Return 0: every step does the same work."""
        del num_tokens
        return 0

    def decode_at(self, x: Tensor, state: AttentionState, position: Tensor) -> tuple[Tensor, AttentionState]:
        q, k, v = self._heads(self._project_next(x[:, None], state), position)
        keys, values = (room.transpose(1, 2) for room in (state.keys, state.values))  # (B, S, H', K)
        keys.index_copy_(1, position, k.to(keys.dtype))  # under autocast they differ
        values.index_copy_(1, position, v.to(values.dtype))
        implementation = self.step_implementation or self.implementation
        y = attention_step(q[:, 0], keys, values, position + 1, implementation=implementation)
        return self.o_proj(y.flatten(1)), state._replace(num_tokens=state.num_tokens + 1)

    def state_bytes_at(self, batch_size: int, context_tokens: int) -> int:
        cache = 2 * batch_size * context_tokens * self.kv_width * self.k_proj.weight.element_size()
        return cache + sum(conv.tail_bytes(batch_size) for conv in self.convs)

    def flops(self, context_tokens: int, phase: Phase) -> Flops:
        """Count 2 (2 D H K + 2 D d_kv) per token for projections and 4 H K per query-key pair."""
        num_queries = context_tokens if phase == "prefill" else 1
        pairs = context_tokens * (context_tokens + 1) / 2 if phase == "prefill" else context_tokens
        q_width = self.q_proj.weight.shape[0]
        weights = sum(p.weight.numel() for p in (self.q_proj, self.k_proj, self.v_proj, self.o_proj))
        per_token = 2.0 * weights + sum(conv.flops_per_token() for conv in self.convs)
        return Flops(
            matmul=num_queries * per_token,
            attention=4.0 * q_width * pairs,
            attention_square=4.0 * q_width * num_queries * context_tokens,
        )
