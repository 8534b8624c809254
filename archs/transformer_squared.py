"""Transformer²: experts that scale singular values, chosen by a first pass over the prompt
(Sun, Cetin and Tang 2025, arXiv 2501.06252).

Glossary beside the project's: E experts, one a domain; r singular values of a matrix; R singular
values of all the feed-forward matrices together; z the multipliers of an expert; a (B, E) the
mixture of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from archs.base import Flops, Phase, SequenceModel, check_prefill
from archs.decoder import Decoder, DecoderState, MixerFactory
from archs.layers import chunked_cross_entropy
from archs.singular_values import SingularSwiGLU, keep_sum

Scale = Literal["paper", "public_code"]
DispatchRule = Literal["pick", "mix"]

# The expert for documents whose domain has none of its own.
ANY_DOMAIN = "any"

# The public code's start value before the sigmoid. Any constant gives the base back there.
PUBLIC_CODE_START = 0.1


class TransformerSquaredState(NamedTuple):
    """decoder: the base's state; mixture a (B, E)."""

    decoder: DecoderState
    mixture: Tensor
    num_tokens: int


class TransformerSquared(SequenceModel):
    """A Decoder whose feed-forward matrices are kept as U diag(S) V', and experts that scale S.

    A row's multipliers are z = 1 + sum_e a_e (z_e - 1): the paper's linear interpolation
    sum_e a_e z_e, with what the mixture leaves of 1 given to the base. A mixture of zeros is the
    base. Only the experts and the domain classifier are learned here; the base is frozen.

    vocab_size .. norm_eps: those of the base, see `archs.decoder.Decoder`; its weights come through
                    `load_base`.
    domains:        names of the experts, in the order of the mixture's columns.
    scale:          "paper": the expert vector is z, starting at 1. "public_code": z is
                    sigmoid(vector) max_multiplier, and the matrix is scaled back to the sum of its
                    singular values.
    dispatch_rule:  "pick": the classifier's first choice. "mix": its probabilities.

    Raises ValueError where there is no domain, one occurs twice, or a setting is not known.
    """

    is_adaptive = True

    def __init__(
        self,
        *,
        vocab_size: int,
        d_model: int,
        num_layers: int,
        d_ff: int,
        mixers: Sequence[MixerFactory],
        domains: Sequence[str],
        is_tied: bool = True,
        norm_eps: float = 1e-6,
        scale: Scale = "paper",
        max_multiplier: float = 1.0,
        dispatch_rule: DispatchRule = "pick",
    ) -> None:
        super().__init__()
        if d_ff < 1:
            raise ValueError(f"d_ff={d_ff} must be positive: the experts scale the feed-forward")
        if not domains or len(set(domains)) < len(domains):
            raise ValueError(f"domains={list(domains)} must be at least one name, each once")
        for name, value, known in (
            ("scale", scale, get_args(Scale)),
            ("dispatch_rule", dispatch_rule, get_args(DispatchRule)),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}")
        self.vocab_size, self.domains = vocab_size, tuple(domains)
        self.scale, self.max_multiplier, self.dispatch_rule = scale, max_multiplier, dispatch_rule
        self.base = Decoder(
            vocab_size=vocab_size,
            d_model=d_model,
            num_layers=num_layers,
            d_ff=d_ff,
            mixers=mixers,
            is_tied=is_tied,
            norm_eps=norm_eps,
        )
        feed_forwards = []
        for block in self.base.blocks:
            feed_forwards.append(SingularSwiGLU(feed_forward=block.feed_forward))
            block.feed_forward = None  # the block is then its mixers alone
        self.base.requires_grad_(False)
        self.feed_forwards = nn.ModuleList(feed_forwards)
        self.ranks = [matrix.s.numel() for layer in self.feed_forwards for matrix in layer.matrices]
        self.experts = nn.Parameter(torch.empty(len(self.domains), sum(self.ranks)))
        # `loss` does not reach the classifier: its training asks for its gradients itself.
        self.classifier = nn.Linear(2 * d_model, len(self.domains)).requires_grad_(False)
        self.reset_experts()

    # The base and the experts

    def reset_experts(self) -> None:
        """Puts every expert back to the base, and the classifier to no opinion."""
        nn.init.constant_(self.experts, 1.0 if self.scale == "paper" else PUBLIC_CODE_START)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    @torch.no_grad()
    def load_base(self, weights: Mapping[str, Tensor]) -> None:
        """Takes a Decoder's `state_dict`, decomposes its feed-forward matrices and resets the experts.

        Raises ValueError where it is not that of a Decoder of this configuration.
        """
        rest = dict(weights)
        matrices = []
        for layer, feed_forward in enumerate(self.feed_forwards):
            for name, matrix in feed_forward.named_children():
                key = f"blocks.{layer}.feed_forward.{name}.weight"
                if key not in rest:
                    raise ValueError(f"the base's weights lack {key}")
                matrices.append((matrix, rest.pop(key)))
        for matrix, weight in matrices:
            matrix.load_matrix(weight)
        try:
            self.base.load_state_dict(rest)
        except RuntimeError as error:
            raise ValueError(f"the base's weights do not fit: {' '.join(str(error).split())}") from None
        self.reset_experts()

    @property
    def num_parameters(self) -> int:
        """Weights of the base, the experts and the classifier; a decomposed matrix counts the m n
        entries it stands for."""
        matrices = (matrix for layer in self.feed_forwards for matrix in layer.matrices)
        return sum(p.numel() for p in self.parameters()) + sum(m.num_entries for m in matrices)

    def gains(self, mixture: Tensor) -> list[tuple[Tensor, ...]]:
        """mixture (B, E) -> for each layer the gains (B, r) of its three matrices."""
        multipliers = self.experts
        if self.scale == "public_code":
            multipliers = torch.sigmoid(multipliers) * self.max_multiplier
        split = (1.0 + mixture.to(multipliers.dtype) @ (multipliers - 1.0)).split(self.ranks, dim=-1)
        gains = []
        for layer, feed_forward in enumerate(self.feed_forwards):
            own = split[3 * layer : 3 * layer + 3]
            if self.scale == "public_code":
                own = [keep_sum(z, m.s) for z, m in zip(own, feed_forward.matrices, strict=True)]
            gains.append(tuple(own))
        return gains

    def domain_mixture(self, domain: str, batch_size: int) -> Tensor:
        """(B, E): in every row the expert of `domain` alone, or the one for any text where there is
        one, or zeros, the base."""
        mixture = self.experts.new_zeros(batch_size, len(self.domains))
        name = domain if domain in self.domains else ANY_DOMAIN
        if name in self.domains:
            mixture[:, self.domains.index(name)] = 1.0
        return mixture

    # The contract

    def features(self, tokens: Tensor, mixture: Tensor | None = None) -> Tensor:
        """tokens (B, T), mixture (B, E) or None for the base -> the head's input (B, T, D)."""
        if mixture is None:
            mixture = self.experts.new_zeros(tokens.shape[0], len(self.domains))
        x = self.base.embedding(tokens)
        for block, feed_forward, gains in zip(
            self.base.blocks, self.feed_forwards, self.gains(mixture), strict=True
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
        x, state = self._step(tokens, state, num_tokens)
        return self.base.head(self.base.norm(x[:, num_tokens - num_logits :])), state

    def decode(self, token: Tensor, state: TransformerSquaredState) -> tuple[Tensor, TransformerSquaredState]:
        x, state = self._step(token, state, 1)
        return self.base.head(self.base.norm(x)), state

    def _step(
        self, tokens: Tensor, state: TransformerSquaredState, num_tokens: int
    ) -> tuple[Tensor, TransformerSquaredState]:
        """The residual stream of tokens (B, C), or of one token (B,)."""
        is_decode = tokens.dim() == 1
        x, new_states = self.base.embedding(tokens), []
        for block, feed_forward, gains, block_states in zip(
            self.base.blocks,
            self.feed_forwards,
            self.gains(state.mixture),
            state.decoder.mixers,
            strict=True,
        ):
            x, block_states = block.step(x, block_states, is_decode=is_decode)
            x = x + feed_forward(block.feed_forward_norm(x), gains)
            new_states.append(block_states)
        total = state.num_tokens + num_tokens
        return x, TransformerSquaredState(DecoderState(tuple(new_states), total), state.mixture, total)

    # The first pass

    def pooled_features(self, prompt: Tensor) -> Tensor:
        """prompt (B, T) -> what the classifier reads (B, 2 D): the base's final features, their mean
        and the last. The mean tells the kind of text, the last what the prompt ends by asking."""
        features = self.features(prompt)
        return torch.cat((features.mean(dim=1), features[:, -1]), dim=-1)

    @torch.no_grad()
    def dispatch(self, prompt: Tensor, state: TransformerSquaredState) -> TransformerSquaredState:
        """The first pass (section 3.2, the classification expert): reads the whole prompt (B, T) with
        the base and fixes the mixture of every row by `dispatch_rule`.

        The paper's classifier is an expert that answers a question about the prompt in words; here
        it is a linear layer on `pooled_features`, for models that cannot be asked in words.
        Raises ValueError where `state` is not empty or has another batch size.
        """
        _check_empty(state)
        if prompt.shape[0] != state.mixture.shape[0]:
            raise ValueError(f"the prompt has {prompt.shape[0]} rows and the state {state.mixture.shape[0]}")
        scores = self.classifier(self.pooled_features(prompt))
        if self.dispatch_rule == "mix":
            mixture = scores.softmax(dim=-1)
        else:
            mixture = torch.zeros_like(scores).scatter_(1, scores.argmax(dim=-1, keepdim=True), 1.0)
        return state._replace(mixture=mixture.to(state.mixture.dtype))

    def select_domain(self, domain: str, state: TransformerSquaredState) -> TransformerSquaredState:
        _check_empty(state)
        return state._replace(mixture=self.domain_mixture(domain, state.mixture.shape[0]))

    # Cost

    def state_bytes_at(self, batch_size: int, context_tokens: int) -> int:
        mixture = batch_size * len(self.domains) * self.experts.element_size()
        return self.base.state_bytes_at(batch_size, context_tokens) + mixture

    def flops(self, context_tokens: int, phase: Phase) -> Flops:
        """The base's, a feed-forward product of 2 m n in factored form, 2 (m + n) r; and 2 E R a call
        to mix the experts. The first pass is apart, in `dispatch_flops`."""
        num_tokens = context_tokens if phase == "prefill" else 1
        matrices = (matrix for layer in self.feed_forwards for matrix in layer.matrices)
        per_token = sum(matrix.flops_per_token() for matrix in matrices)
        mixing = 2.0 * self.experts.numel()
        return self.base.flops(context_tokens, phase).plus(Flops(matmul=num_tokens * per_token + mixing))

    def dispatch_flops(self, prompt_tokens: int) -> Flops:
        """The first pass over a prompt: a prefill without the head's product, and the classifier."""
        head, classifier = self.base.head.weight.numel(), self.classifier.weight.numel()
        return self.flops(prompt_tokens, "prefill").plus(Flops(matmul=2.0 * (classifier - head)))


def _check_empty(state: TransformerSquaredState) -> None:
    if state.num_tokens:
        raise ValueError(
            f"the mixture is fixed before the first token; this state has read {state.num_tokens}"
        )
