"""Transformer²: experts that scale singular values, chosen by a first pass over the prompt
(Sun, Cetin and Tang 2025, arXiv 2501.06252).

Glossary beside the project's: E experts, one a domain; r singular values of a matrix; R singular
values of all the feed-forward matrices together; z the multipliers of an expert; a (B, E) the
mixture of a row.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from archs.base import (
    AdaptiveModel,
    Advance,
    Flops,
    Phase,
    SequenceModel,
    check_prefill,
    decode,
    decode_at,
    prefill,
)
from archs.cross_entropy import chunked_cross_entropy
from archs.decoder import Decoder, DecoderState
from archs.transformer_squared.dispatch import Dispatcher, DispatchRule, Strategy
from archs.transformer_squared.lora import LowRankAdapters
from archs.transformer_squared.svf import SingularLinear, SingularSwiGLU, keep_sum

Scale = Literal["paper", "public_code"]

# The expert for documents whose domain has none of its own.
ANY_DOMAIN = "any"

# The public code's start value before the sigmoid. Any constant gives the base back there.
PUBLIC_CODE_START = 0.1


class TransformerSquaredState(NamedTuple):
    """decoder: the base's state; mixture a (B, E)."""

    decoder: DecoderState
    mixture: Tensor
    num_tokens: int


class TransformerSquared(AdaptiveModel):
    """A Decoder whose feed-forward matrices are kept as U diag(S) V', and experts that scale S.

    A row's multipliers are z = 1 + sum_e a_e (z_e - 1): the paper's linear interpolation
    sum_e a_e z_e, with what the mixture leaves of 1 given to the base. A mixture of zeros is the
    base. Only the experts and what dispatches them are learned here; the base is frozen.

    base:            any Decoder with a feed-forward, a published checkpoint's too. It is taken apart: use
                     `base` of this model from then on. Weights of another training come through `load_base`.
    domains:         names of the experts, in the order of the mixture's columns.
    scale:           "paper": the expert vector is z, starting at 1. "public_code": z is
                     sigmoid(vector) max_multiplier, and the matrix is scaled back to the sum of its
                     singular values.
    dispatch_strategy, dispatch_rule, classification_prompt, few_shot_target: see
                     `archs.transformer_squared.dispatch`.
    lora_rank, lora_scale: of the LoRA adapters that are trained beside the experts to compare with; see
                     `archs.transformer_squared.lora`. They are no part of the model and not counted among
                     its parameters.

    Raises ValueError where the base is no Decoder or has no feed-forward, there is no domain, one occurs
    twice, or a setting is not known.
    """

    def __init__(
        self,
        *,
        base: SequenceModel,
        domains: Sequence[str],
        scale: Scale = "paper",
        max_multiplier: float = 1.0,
        dispatch_strategy: Strategy = "classifier",
        dispatch_rule: DispatchRule = "pick",
        classification_prompt: tuple[Sequence[int], Sequence[int]] | None = None,
        few_shot_target: str | None = None,
        lora_rank: int | None = None,
        lora_scale: float = 2.0,
    ) -> None:
        super().__init__()
        if not isinstance(base, Decoder):
            raise ValueError(f"the base of Transformer² must be a Decoder, not a {type(base).__name__}")
        if any(block.feed_forward is None for block in base.blocks):
            raise ValueError(
                "the base of Transformer² has no feed-forward matrices (d_ff=0), whose singular values the "
                "experts scale; choose one that has, such as arch@reference=transformer"
            )
        if not domains or len(set(domains)) < len(domains):
            raise ValueError(f"domains={list(domains)} must be at least one name, each once")
        if scale not in get_args(Scale):
            raise ValueError(f"scale={scale!r} must be one of {', '.join(get_args(Scale))}")
        self.vocab_size, self.domains = base.vocab_size, tuple(domains)
        self.scale, self.max_multiplier = scale, max_multiplier
        self.base = base
        feed_forwards = []
        for block in self.base.blocks:
            feed_forwards.append(SingularSwiGLU(feed_forward=block.feed_forward))
            block.feed_forward = None  # the block is then its mixers alone
        self.base.requires_grad_(False)
        self.feed_forwards = nn.ModuleList(feed_forwards)
        self.ranks = [matrix.s.numel() for matrix in self.matrices]
        self.experts = nn.Parameter(torch.empty(len(self.domains), sum(self.ranks)))
        self.dispatcher = Dispatcher(
            domains=self.domains,
            num_features=2 * base.d_model,
            num_multipliers=sum(self.ranks),
            strategy=dispatch_strategy,
            rule=dispatch_rule,
            classification_prompt=classification_prompt,
            few_shot_target=few_shot_target,
        )
        self.lora = LowRankAdapters(
            shapes=[matrix.shape for matrix in self.matrices],
            num_adapters=len(self.domains),
            budget=sum(self.ranks),
            rank=lora_rank,
            scale=lora_scale,
        )
        self.to(base.embedding.weight)  # where the base is, and in its dtype
        self.reset_experts()

    # The base and the experts

    @property
    def matrices(self) -> list[SingularLinear]:
        """Return the feed-forward matrices, layer by layer: gate, up, down."""
        return [matrix for layer in self.feed_forwards for matrix in layer.matrices]

    @property
    def classifier(self) -> nn.Linear:
        """Return the linear map of the strategy "classifier"."""
        return self.dispatcher.classifier

    def reset_experts(self) -> None:
        """Put every expert back to the base, what dispatches to no opinion, and LoRA to its start."""
        start = 1.0 if self.scale == "paper" else PUBLIC_CODE_START
        nn.init.constant_(self.experts, start)
        self.dispatcher.reset(start)
        self.lora.reset()

    @torch.no_grad()
    def load_base(self, weights: Mapping[str, Tensor]) -> None:
        """Take a Decoder's `state_dict`, decompose its feed-forward matrices and reset the experts.

        Raises ValueError where it is not that of a Decoder of this configuration.
        """
        rest = dict(weights)
        matrices = []
        for layer, feed_forward in enumerate(self.feed_forwards):
            for name, matrix in feed_forward.named_children():
                for part in ("weight", "bias") if matrix.bias is not None else ("weight",):
                    key = f"blocks.{layer}.feed_forward.{name}.{part}"
                    if key not in rest:
                        raise ValueError(f"the base's weights lack {key}")
                    matrices.append((matrix, part, rest.pop(key)))
        for matrix, part, values in matrices:
            if part == "weight":
                matrix.load_matrix(values)
            else:
                matrix.bias.copy_(values)
        try:
            self.base.load_state_dict(rest)
        except RuntimeError as error:
            raise ValueError(f"the base's weights do not fit: {' '.join(str(error).split())}") from None
        self.reset_experts()

    @property
    def num_parameters(self) -> int:
        """Count the weights of the base, the experts and what the dispatching strategy has learned; a
        decomposed matrix counts the m n entries it stands for. LoRA is not part of the model."""
        base = sum(p.numel() for p in self.base.parameters()) + sum(m.num_entries for m in self.matrices)
        dispatcher = self.dispatcher
        return base + self.experts.numel() + dispatcher.num_parameters_of(dispatcher.strategy)

    def num_tuned_parameters(self, adaptation: str) -> int:
        if adaptation == "base":
            return 0
        if adaptation == "lora":
            return self.lora.num_parameters_each
        if adaptation == "expert":
            return self.experts.shape[1]
        return self.experts.numel() + self.dispatcher.num_parameters_of(adaptation)

    def _multipliers(self, vectors: Tensor) -> Tensor:
        """Expert vectors (..., R) -> what they multiply the singular values by, (..., R)."""
        if self.scale == "public_code":
            return torch.sigmoid(vectors) * self.max_multiplier
        return vectors

    def _mixed(self, mixture: Tensor) -> Tensor:
        """mixture (B, E) -> z (B, R)."""
        multipliers = self._multipliers(self.experts)
        return 1.0 + mixture.to(multipliers.dtype) @ (multipliers - 1.0)

    def _gains(self, z: Tensor) -> list[tuple[Tensor, ...]]:
        """z (B, R) -> for each layer the gains (B, r) of its three matrices."""
        gains = list(z.split(self.ranks, dim=-1))
        if self.scale == "public_code":
            gains = [keep_sum(own, m.s) for own, m in zip(gains, self.matrices, strict=True)]
        return [tuple(gains[first : first + 3]) for first in range(0, len(gains), 3)]

    def domain_mixture(self, domain: str, batch_size: int) -> Tensor:
        """(B, E): in every row the expert of `domain` alone, or the one for any text where there is
        one, or zeros, the base."""
        mixture = self.experts.new_zeros(batch_size, len(self.domains))
        name = domain if domain in self.domains else ANY_DOMAIN
        if name in self.domains:
            mixture[:, self.domains.index(name)] = 1.0
        return mixture

    def lora_attached(self, domain: str) -> AbstractContextManager[None]:
        """Within the block the model computes with the LoRA adapter of `domain` added."""
        return self.lora.attached(self.matrices, self.domains.index(domain))

    # The contract

    def head(self, features: Tensor) -> Tensor:
        """(..., D) -> logits (..., V)."""
        return self.base.head(features)

    def features(self, tokens: Tensor, mixture: Tensor | None = None) -> Tensor:
        """tokens (B, T), mixture (B, E) or None for the base -> the head's input (B, T, D)."""
        if mixture is None:
            mixture = self.experts.new_zeros(tokens.shape[0], len(self.domains))
        return self._features(tokens, self._mixed(mixture))

    def features_under(self, tokens: Tensor, vector: Tensor) -> Tensor:
        """Return `features` under one expert vector (R,) that need not be among the experts."""
        return self._features(tokens, self._multipliers(vector)[None].expand(tokens.shape[0], -1))

    def _features(self, tokens: Tensor, z: Tensor) -> Tensor:
        x = self.base.embedding(tokens)
        for block, feed_forward, gains in zip(
            self.base.blocks, self.feed_forwards, self._gains(z), strict=True
        ):
            x = block(x)
            x = x + feed_forward(block.feed_forward_norm(x), gains)
        return self.base.norm(x)

    def forward(self, tokens: Tensor, mixture: Tensor | None = None) -> Tensor:
        """tokens (B, T), mixture (B, E) or None for the base -> logits (B, T, V)."""
        return self.base.head(self.features(tokens, mixture))

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        weights: Tensor | None = None,
        mixture: Tensor | None = None,
    ) -> Tensor:
        return chunked_cross_entropy(self.features(tokens, mixture), self.base.head, targets, weights)

    def answer_logits(self, prompts: Tensor, answers: Tensor, mixture: Tensor | None = None) -> Tensor:
        """prompts (B, P), answers (B, A) -> the logits (B, A, V) that predict the answers' tokens."""
        tokens = torch.cat((prompts, answers[:, :-1]), dim=1)
        return self.base.head(self.features(tokens, mixture)[:, prompts.shape[1] - 1 :])

    def init_state(self, batch_size: int, max_context_tokens: int) -> TransformerSquaredState:
        decoder = self.base.init_state(batch_size, max_context_tokens)
        mixture = self.experts.new_zeros(batch_size, len(self.domains))
        return TransformerSquaredState(decoder, mixture, 0)

    def prefill(
        self, tokens: Tensor, state: TransformerSquaredState, num_logits: int = 1
    ) -> tuple[Tensor, TransformerSquaredState]:
        num_tokens = tokens.shape[1]
        check_prefill(num_tokens, num_logits)
        x, state = self._step(tokens, state, num_tokens, prefill)
        return self.base.head(self.base.norm(x[:, num_tokens - num_logits :])), state

    def decode(self, token: Tensor, state: TransformerSquaredState) -> tuple[Tensor, TransformerSquaredState]:
        x, state = self._step(token, state, 1, decode)
        return self.base.head(self.base.norm(x)), state

    def step_kind(self, num_tokens: int) -> Hashable:
        """Return the base's."""
        return self.base.step_kind(num_tokens)

    def decode_at(
        self, token: Tensor, state: TransformerSquaredState, position: Tensor
    ) -> tuple[Tensor, TransformerSquaredState]:
        x, state = self._step(token, state, 1, decode_at(position))
        return self.base.head(self.base.norm(x)), state

    def _step(
        self, tokens: Tensor, state: TransformerSquaredState, num_tokens: int, advance: Advance
    ) -> tuple[Tensor, TransformerSquaredState]:
        """Return the residual stream of tokens (B, C), or of one token (B,)."""
        x, new_states = self.base.embedding(tokens), []
        for block, feed_forward, gains, block_states in zip(
            self.base.blocks,
            self.feed_forwards,
            self._gains(self._mixed(state.mixture)),
            state.decoder.mixers,
            strict=True,
        ):
            x, block_states = block.step(x, block_states, advance)
            x = x + feed_forward(block.feed_forward_norm(x), gains)
            new_states.append(block_states)
        total = state.num_tokens + num_tokens
        return x, TransformerSquaredState(DecoderState(tuple(new_states), total), state.mixture, total)

    # The first pass

    @torch.no_grad()
    def dispatch(
        self,
        prompt: Tensor,
        state: TransformerSquaredState,
        strategy: str | None = None,
        target: str | None = None,
    ) -> TransformerSquaredState:
        """Do the first pass (section 3.2): read the whole prompt (B, T) and fix the mixture of every row,
        by the model's own strategy or by another; see `archs.transformer_squared.dispatch`.

        Raises ValueError where `state` is not empty or has another batch size.
        """
        _check_empty(state)
        if prompt.shape[0] != state.mixture.shape[0]:
            raise ValueError(f"the prompt has {prompt.shape[0]} rows and the state {state.mixture.shape[0]}")
        mixture = self.dispatcher.choose(self, prompt, strategy, target)
        return state._replace(mixture=mixture.to(state.mixture.dtype))

    def select_domain(self, domain: str, state: TransformerSquaredState) -> TransformerSquaredState:
        _check_empty(state)
        return state._replace(mixture=self.domain_mixture(domain, state.mixture.shape[0]))

    # Cost

    def state_bytes_at(self, batch_size: int, context_tokens: int) -> int:
        mixture = batch_size * len(self.domains) * self.experts.element_size()
        return self.base.state_bytes_at(batch_size, context_tokens) + mixture

    def flops(self, context_tokens: int, phase: Phase) -> Flops:
        """Count the base's, a feed-forward product of 2 m n in factored form, 2 (m + n) r; and 2 E R a call
        to mix the experts. The first pass is apart, in `dispatch_flops`."""
        num_tokens = context_tokens if phase == "prefill" else 1
        per_token = sum(matrix.flops_per_token() for matrix in self.matrices)
        mixing = 2.0 * self.experts.numel()
        return self.base.flops(context_tokens, phase).plus(Flops(matmul=num_tokens * per_token + mixing))

    def dispatch_flops(self, prompt_tokens: int) -> Flops:
        """Count the first pass over a prompt, by the model's own strategy."""
        head, mixing = 2.0 * self.base.head.weight.numel(), 2.0 * self.experts.numel()
        return self.dispatcher.flops(self, prompt_tokens, head=head, mixing=mixing)


def _check_empty(state: TransformerSquaredState) -> None:
    if state.num_tokens:
        raise ValueError(
            f"the mixture is fixed before the first token; this state has read {state.num_tokens}"
        )
