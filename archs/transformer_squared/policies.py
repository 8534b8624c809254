"""What is tuned for a domain: a singular-value expert of Transformer², or a LoRA adapter beside it.

Both answer prompts under the same frozen base, so that one training serves both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from archs.base import State
from archs.generate import Sampling, generate, read
from archs.transformer_squared.model import TransformerSquared


class Policy(ABC):
    """The model under one domain's tuned parameters, the entry `index` of each of `parameters`; the other
    entries get no gradient."""

    def __init__(self, model: TransformerSquared, domain: str) -> None:
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
        """Return a context in which prefill and decode run."""

    @abstractmethod
    def _start(self, state: State) -> State:
        """Return an empty state as it is before the first token."""

    @torch.no_grad()
    def sample(self, prompts: Tensor, *, num_tokens: int, generator: torch.Generator) -> Tensor:
        """Sample continuations at temperature 1: prompts (B, P) -> tokens (B, num_tokens)."""
        batch_size, prompt_tokens = prompts.shape
        with self._adapted():
            state = self._start(self.model.init_state(batch_size, prompt_tokens + num_tokens))
            reading = read(self.model, prompts, state)
            sampling = Sampling(temperature=1.0)
            return generate(
                self.model, reading, num_tokens=num_tokens, sampling=sampling, generator=generator
            ).tokens

    def get(self) -> list[Tensor]:
        """Return a copy of this domain's parameters."""
        return [parameter[self.index].detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def put(self, values: list[Tensor]) -> None:
        """Set this domain's parameters."""
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
