"""The first pass of Transformer²: which experts a prompt gets (Sun, Cetin and Tang 2025, arXiv
2501.06252, section 3.2).

Glossary beside the project's: E experts; R singular values of all feed-forward matrices together; a
(B, E) the mixture of a row; Q tokens of the question.

The strategies:
    prompt                 The paper's A: the base is asked in words what kind of text the prompt is. Here
                           the question is multiple choice, one letter a domain, appended to the prompt, and
                           the answer is read off as the letters' probabilities, so that a model that cannot
                           follow an instruction still gives one: log p(letter | prompt, question) less log
                           p(letter | question), for a letter's own frequency says nothing of the prompt
                           (contextual calibration, Zhao et al. 2021, arXiv 2102.09690). The paper's
                           further answer "others" is left out.
    classification_expert  The paper's B: the same question, asked under an expert of its own that was trained
                           to answer it; not calibrated.
    classifier             Ours: a linear layer on the base's features, for models that cannot be asked in
                           words. No question is appended.
    few_shot               The paper's C: a mixture that was searched once for a target task on a few of its
                           examples; nothing is read of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from archs.base import Flops, Phase

Strategy = Literal["classifier", "prompt", "classification_expert", "few_shot"]
DispatchRule = Literal["pick", "mix"]


class Reader(Protocol):
    """The model that the first pass reads with; see archs.transformer_squared.model."""

    def features(self, tokens: Tensor, mixture: Tensor | None = None) -> Tensor: ...
    def features_under(self, tokens: Tensor, vector: Tensor) -> Tensor: ...
    def head(self, features: Tensor) -> Tensor: ...
    def flops(self, context_tokens: int, phase: Phase) -> Flops: ...


class Dispatcher(nn.Module):
    """All that the strategies of the module learn, and their choice.

    num_features:           of `pooled_features`. num_multipliers: R.
    strategy:               that dispatching uses where no other is asked for.
    rule:                   "pick": the first choice alone. "mix": the choices' probabilities. few_shot is
                            a mixture already.
    classification_prompt:  the tokens of the question (Q,) and the E letters' (E,), one a domain.
    few_shot_target:        the domain whose examples the few-shot mixture was searched on.

    Raises ValueError where a setting is not known, or a strategy lacks what it needs.
    """

    question: Tensor
    labels: Tensor
    mixtures: Tensor

    def __init__(
        self,
        *,
        domains: Sequence[str],
        num_features: int,
        num_multipliers: int,
        strategy: Strategy,
        rule: DispatchRule,
        classification_prompt: tuple[Sequence[int], Sequence[int]] | None,
        few_shot_target: str | None,
    ) -> None:
        super().__init__()
        if rule not in get_args(DispatchRule):
            raise ValueError(f"dispatch_rule={rule!r} must be one of {', '.join(get_args(DispatchRule))}")
        question, labels = classification_prompt or ((), ())
        if labels and (len(labels) != len(domains) or len(set(labels)) < len(labels)):
            raise ValueError(f"classification_prompt has the labels {list(labels)}; one a domain is needed")
        self.domains, self.strategy, self.rule = tuple(domains), strategy, rule
        self.few_shot_target = few_shot_target
        self.classifier = nn.Linear(num_features, len(domains))
        self.expert = nn.Parameter(torch.empty(num_multipliers))
        # `loss` does not reach these: their training asks for its gradients itself.
        self.requires_grad_(False)
        self.register_buffer("question", torch.tensor(list(question), dtype=torch.long), persistent=False)
        self.register_buffer("labels", torch.tensor(list(labels), dtype=torch.long), persistent=False)
        self.register_buffer("mixtures", torch.eye(len(domains)))
        self.check(strategy, few_shot_target)

    @torch.no_grad()
    def reset(self, start: float) -> None:
        """No opinion: the classifier at zero, its expert at `start`, which is the base, and for every
        target its own expert."""
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        self.expert.fill_(start)
        nn.init.eye_(self.mixtures)

    def check(self, strategy: str, target: str | None = None) -> None:
        """Raise ValueError if the strategy or its target is unknown, or the strategy lacks what it needs."""
        if strategy not in get_args(Strategy):
            raise ValueError(f"dispatch_strategy={strategy!r} must be one of {', '.join(get_args(Strategy))}")
        if target is not None and target not in self.domains:
            raise ValueError(f"few_shot_target={target!r} must be one of {', '.join(self.domains)}")
        if strategy in ("prompt", "classification_expert") and not self.labels.numel():
            raise ValueError(f"dispatch_strategy={strategy!r} needs a classification_prompt")
        if strategy == "few_shot" and target is None and self.few_shot_target is None:
            raise ValueError("dispatch_strategy='few_shot' needs a few_shot_target, one of the domains")

    def num_parameters_of(self, strategy: str) -> int:
        """Learned numbers that a strategy uses beside the experts."""
        return {
            "classifier": self.classifier.weight.numel() + self.classifier.bias.numel(),
            "prompt": 0,
            "classification_expert": self.expert.numel(),
            "few_shot": len(self.domains),
        }[strategy]

    def label_log_probs(self, model: Reader, prompt: Tensor, *, use_expert: bool) -> Tensor:
        """prompt (B, T), T 0 or more -> log-probability of each letter after the question (B, E)."""
        tokens = torch.cat((prompt, self.question.expand(prompt.shape[0], -1)), dim=1)
        features = model.features_under(tokens, self.expert) if use_expert else model.features(tokens)
        return model.head(features[:, -1]).float().log_softmax(dim=-1)[:, self.labels]

    def pooled_features(self, model: Reader, prompt: Tensor) -> Tensor:
        """prompt (B, T) -> what the classifier reads (B, 2 D): the base's final features, their mean and
        the last. The mean tells the kind of text, the last what the prompt ends by asking."""
        features = model.features(prompt)
        return torch.cat((features.mean(dim=1), features[:, -1]), dim=-1)

    def scores(self, model: Reader, prompt: Tensor, strategy: str) -> Tensor:
        """prompt (B, T) -> log-odds of the domains (B, E), up to a constant a row."""
        if strategy == "classifier":
            return self.classifier(self.pooled_features(model, prompt))
        scores = self.label_log_probs(model, prompt, use_expert=strategy == "classification_expert")
        if strategy == "prompt":
            scores = scores - self.label_log_probs(model, prompt[:1, :0], use_expert=False)
        return scores

    def choose(
        self, model: Reader, prompt: Tensor, strategy: str | None = None, target: str | None = None
    ) -> Tensor:
        """prompt (B, T) -> the mixture of every row (B, E).

        strategy, target: instead of the dispatcher's own. Raises ValueError where they are not known or
        lack what they need."""
        strategy, target = strategy or self.strategy, target or self.few_shot_target
        self.check(strategy, target)
        if strategy == "few_shot":
            assert target is not None
            return self.mixtures[self.domains.index(target)].expand(prompt.shape[0], -1).clone()
        scores = self.scores(model, prompt, strategy)
        if self.rule == "mix":
            return scores.softmax(dim=-1)
        return torch.zeros_like(scores).scatter_(1, scores.argmax(dim=-1, keepdim=True), 1.0)

    def flops(self, model: Reader, prompt_tokens: int, *, head: float, mixing: float) -> Flops:
        """Count the choice by the dispatcher's own strategy: prefills of prompt and question, with the head's
        product of one position, or with the classifier in its place.

        head, mixing: FLOPs of the head's product a position and of mixing the experts a call; under the
        expert of the classification nothing is mixed."""
        if self.strategy == "few_shot":
            return Flops()
        if self.strategy == "classifier":
            own = 2.0 * self.classifier.weight.numel()
            return model.flops(prompt_tokens, "prefill").plus(Flops(matmul=own - head))
        num_question = self.question.numel()
        total = model.flops(prompt_tokens + num_question, "prefill")
        if self.strategy == "prompt":
            return total.plus(model.flops(num_question, "prefill"))
        return total.plus(Flops(matmul=-mixing))
