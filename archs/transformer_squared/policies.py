"""What is tuned for a domain: a singular-value expert of Transformer², or a LoRA adapter beside it.

Both answer prompts under the same frozen base, so that one training serves both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from archs.base import State


class LowRank(Protocol):
    """See archs.transformer_squared.lora. a and b: (E, ...), one entry an adapter."""

    a: nn.ParameterList
    b: nn.ParameterList

    @property
    def num_parameters_each(self) -> int: ...
    @property
    def description(self) -> str: ...


class FirstPass(Protocol):
    """See archs.transformer_squared.dispatch."""

    expert: nn.Parameter
    mixtures: Tensor

    def pooled_features(self, model: AdaptiveModel, prompt: Tensor) -> Tensor: ...
    def scores(self, model: AdaptiveModel, prompt: Tensor, strategy: str) -> Tensor: ...


class AdaptiveModel(Protocol):
    """What the training needs beside `archs.base.SequenceModel`; see archs.transformer_squared.model."""

    domains: tuple[str, ...]
    experts: nn.Parameter
    lora: LowRank
    dispatcher: FirstPass

    @property
    def classifier(self) -> nn.Linear: ...
    def domain_mixture(self, domain: str, batch_size: int) -> Tensor: ...
    def lora_attached(self, domain: str) -> AbstractContextManager[None]: ...
    def answer_logits(self, prompts: Tensor, answers: Tensor, mixture: Tensor | None = None) -> Tensor: ...
    def init_state(self, batch_size: int, max_context_tokens: int) -> State: ...
    def select_domain(self, domain: str, state: State) -> State: ...
    def prefill(self, tokens: Tensor, state: State, num_logits: int = 1) -> tuple[Tensor, State]: ...
    def decode(self, token: Tensor, state: State) -> tuple[Tensor, State]: ...


class Policy(ABC):
    """The model under one domain's tuned parameters, the entry `index` of each of `parameters`; the other
    entries get no gradient."""

    def __init__(self, model: AdaptiveModel, domain: str) -> None:
        self.model, self.domain = model, domain
        self.index = model.domains.index(domain)

    @property
    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """With a leading axis of domains."""

    @abstractmethod
    def answer_logits(self, prompts: Tensor, answers: Tensor) -> Tensor:
        """prompts (B, P), answers (B, A) -> the logits (B, A, V) that predict the answers' tokens."""

    @abstractmethod
    def _adapted(self) -> AbstractContextManager[None]:
        """Where prefill and decode run."""

    @abstractmethod
    def _start(self, state: State) -> State:
        """What an empty state becomes before the first token."""

    @torch.no_grad()
    def sample(self, prompts: Tensor, *, num_tokens: int, generator: torch.Generator) -> Tensor:
        """prompts (B, P) -> continuations (B, num_tokens), sampled at temperature 1."""
        batch_size, prompt_tokens = prompts.shape
        sampled: list[Tensor] = []
        with self._adapted():
            state = self._start(self.model.init_state(batch_size, prompt_tokens + num_tokens))
            logits, state = self.model.prefill(prompts, state)
            logits = logits[:, -1]
            for step in range(num_tokens):
                probabilities = logits.float().softmax(dim=-1)
                sampled.append(torch.multinomial(probabilities, 1, generator=generator)[:, 0])
                if step < num_tokens - 1:
                    logits, state = self.model.decode(sampled[-1], state)
        return torch.stack(sampled, dim=1)

    def get(self) -> list[Tensor]:
        """A copy of this domain's parameters."""
        return [parameter[self.index].detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def put(self, values: list[Tensor]) -> None:
        """Sets this domain's parameters."""
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter[self.index] = value


class ExpertPolicy(Policy):
    """Under the domain's singular-value expert."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.model.experts]

    def answer_logits(self, prompts: Tensor, answers: Tensor) -> Tensor:
        mixture = self.model.domain_mixture(self.domain, prompts.shape[0])
        return self.model.answer_logits(prompts, answers, mixture)

    def _adapted(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _start(self, state: State) -> State:
        return self.model.select_domain(self.domain, state)


class LowRankPolicy(Policy):
    """Under the base with the domain's LoRA adapter."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*self.model.lora.a, *self.model.lora.b]

    def answer_logits(self, prompts: Tensor, answers: Tensor) -> Tensor:
        with self._adapted():
            return self.model.answer_logits(prompts, answers)

    def _adapted(self) -> AbstractContextManager[None]:
        return self.model.lora_attached(self.domain)

    def _start(self, state: State) -> State:
        return state
