"""Embedding, residual blocks around any mixer, head: the frame that most architectures share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from archs.base import (
    Advance,
    Flops,
    Mixer,
    Phase,
    SequenceModel,
    State,
    check_prefill,
    check_state_request,
    decode,
    decode_at,
    prefill,
)
from archs.cross_entropy import chunked_cross_entropy
from archs.layers import RMSNorm, SwiGLU

MixerFactory = Callable[..., Mixer]


class DecoderState(NamedTuple):
    """mixers: for each layer the states of its mixers, in order."""

    mixers: tuple[tuple[State, ...], ...]
    num_tokens: int


class Block(nn.Module):
    """x + mixer(norm(x)) for each mixer in turn, then x + feed_forward(norm(x))."""

    def __init__(
        self,
        *,
        d_model: int,
        d_ff: int,
        mixers: Sequence[Mixer],
        norm_eps: float,
        use_feed_forward_bias: bool = False,
    ) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(mixers)
        self.mixer_norms = nn.ModuleList(RMSNorm(d_model, eps=norm_eps) for _ in mixers)
        self.feed_forward = (
            SwiGLU(d_model=d_model, d_ff=d_ff, use_bias=use_feed_forward_bias) if d_ff else None
        )
        self.feed_forward_norm = RMSNorm(d_model, eps=norm_eps) if d_ff else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        for norm, mixer in zip(self.mixer_norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return self._feed_forward(x)

    def step(self, x: Tensor, states: tuple[State, ...], advance: Advance) -> tuple[Tensor, tuple]:
        """Prefill of (B, C, D) or decode of (B, D) with the mixers' states, as `advance` does it."""
        new_states = []
        for norm, mixer, state in zip(self.mixer_norms, self.mixers, states, strict=True):
            y, state = advance(mixer, norm(x), state)
            x = x + y
            new_states.append(state)
        return self._feed_forward(x), tuple(new_states)

    def _feed_forward(self, x: Tensor) -> Tensor:
        if self.feed_forward is None or self.feed_forward_norm is None:
            return x
        return x + self.feed_forward(self.feed_forward_norm(x))


class Decoder(SequenceModel):
    """A pre-norm decoder. Layer i uses `mixers[i % len(mixers)]`, after `pre_mixer` if given.

    mixers and pre_mixer are factories, called with `d_model`. `d_ff` 0 leaves the feed-forward
    out (Mamba); `use_feed_forward_bias` gives its three matrices a bias each. Raises ValueError where a
    size is not positive.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        d_model: int,
        num_layers: int,
        d_ff: int,
        mixers: Sequence[MixerFactory],
        pre_mixer: MixerFactory | None = None,
        is_tied: bool = True,
        norm_eps: float = 1e-6,
        use_feed_forward_bias: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("vocab_size", vocab_size), ("d_model", d_model), ("num_layers", num_layers)):
            if value < 1:
                raise ValueError(f"{name}={value} must be positive")
        if not mixers:
            raise ValueError("mixers=[] must hold at least one mixer")
        if d_ff < 0:
            raise ValueError(f"d_ff={d_ff} must not be negative")
        self.vocab_size, self.d_model = vocab_size, d_model
        self.embedding = nn.Embedding(vocab_size, d_model)
        blocks = []
        for layer in range(num_layers):
            layer_mixers = [] if pre_mixer is None else [pre_mixer(d_model=d_model)]
            layer_mixers.append(mixers[layer % len(mixers)](d_model=d_model))
            blocks.append(
                Block(
                    d_model=d_model,
                    d_ff=d_ff,
                    mixers=layer_mixers,
                    norm_eps=norm_eps,
                    use_feed_forward_bias=use_feed_forward_bias,
                )
            )
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(d_model, eps=norm_eps)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5)
        if is_tied:
            self.head.weight = self.embedding.weight

    def features(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> the head's input (B, T, D)."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.features(tokens))

    def loss(self, tokens: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        return chunked_cross_entropy(self.features(tokens), self.head, targets, weights)

    def init_state(self, batch_size: int, max_context_tokens: int) -> DecoderState:
        check_state_request(batch_size, max_context_tokens)
        mixers = tuple(
            tuple(mixer.init_state(batch_size, max_context_tokens) for mixer in block.mixers)
            for block in self.blocks
        )
        return DecoderState(mixers, 0)

    def prefill(
        self, tokens: Tensor, state: DecoderState, num_logits: int = 1
    ) -> tuple[Tensor, DecoderState]:
        num_tokens = tokens.shape[1]
        check_prefill(num_tokens, num_logits)
        x, mixers = self._step(self.embedding(tokens), state, prefill)
        logits = self.head(self.norm(x[:, num_tokens - num_logits :]))
        return logits, DecoderState(mixers, state.num_tokens + num_tokens)

    def decode(self, token: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        return self._decode(token, state, decode)

    def step_kind(self, num_tokens: int) -> Hashable:
        """Return the kinds of all mixers' steps."""
        return tuple(mixer.step_kind(num_tokens) for block in self.blocks for mixer in block.mixers)

    def decode_at(self, token: Tensor, state: DecoderState, position: Tensor) -> tuple[Tensor, DecoderState]:
        return self._decode(token, state, decode_at(position))

    def _decode(self, token: Tensor, state: DecoderState, advance: Advance) -> tuple[Tensor, DecoderState]:
        x, mixers = self._step(self.embedding(token), state, advance)
        return self.head(self.norm(x)), DecoderState(mixers, state.num_tokens + 1)

    def _step(self, x: Tensor, state: DecoderState, advance: Advance) -> tuple[Tensor, tuple]:
        new_states = []
        for block, block_states in zip(self.blocks, state.mixers, strict=True):
            x, block_states = block.step(x, block_states, advance)
            new_states.append(block_states)
        return x, tuple(new_states)

    def state_bytes_at(self, batch_size: int, context_tokens: int) -> int:
        check_state_request(batch_size, context_tokens)
        return sum(
            mixer.state_bytes_at(batch_size, context_tokens)
            for block in self.blocks
            for mixer in block.mixers
        )

    def flops(self, context_tokens: int, phase: Phase) -> Flops:
        num_tokens = context_tokens if phase == "prefill" else 1
        total = Flops(matmul=2.0 * self.head.weight.numel())
        for block in self.blocks:
            for mixer in block.mixers:
                total = total.plus(mixer.flops(context_tokens, phase))
            if block.feed_forward is not None:
                total = total.plus(Flops(matmul=num_tokens * block.feed_forward.flops_per_token()))
        return total
