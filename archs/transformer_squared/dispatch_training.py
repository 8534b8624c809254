"""What the first pass of Transformer² learns: the classifier, the expert of the classification and the
few-shot mixtures (Sun, Cetin and Tang 2025, arXiv 2501.06252, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from archs.base import Sampler
from archs.transformer_squared.model import TransformerSquared
from archs.transformer_squared.training import batch_of

#: Steps and rate of the linear classifier, whose features are computed once.
CLASSIFIER_STEPS, CLASSIFIER_RATE = 400, 3e-3


@dataclass(frozen=True, kw_only=True)
class DispatchTraining:
    """num_classifier_batches: training batches a domain that the linear classifier is fitted to.
    num_expert_steps, expert_learning_rate: of the expert of the classification, by Adam.
    num_validation_batches: a domain. Raises ValueError where a number is not positive."""

    num_classifier_batches: int
    num_validation_batches: int
    num_expert_steps: int
    expert_learning_rate: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"{name}={value} must be positive")


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """The cross-entropy method (Rubinstein and Kroese 2004) over mixtures, each weight in [0, 1].

    population, elite_share, num_iterations: mixtures an iteration, the share of them that the next
    iteration's distribution is fitted to, and iterations. num_shots: examples they are scored on.
    Raises ValueError where a number is out of its range."""

    population: int = 32
    elite_share: float = 0.2
    num_iterations: int = 50
    num_shots: int = 10

    def __post_init__(self) -> None:
        for name in ("population", "num_iterations", "num_shots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if not 2 <= self.num_elites <= self.population:
            raise ValueError(
                f"elite_share={self.elite_share} of population={self.population} must be two mixtures or more"
            )

    @property
    def num_elites(self) -> int:
        """Return how many mixtures a distribution is fitted to."""
        return int(self.elite_share * self.population)


def _labelled(
    model: TransformerSquared, samplers: Mapping[str, Sampler], step: int, share: int = 1
) -> tuple[Tensor, Tensor]:
    """Return prompts of every domain, one in `share` of a batch, and their domains' numbers."""
    prompts = [batch_of(model, samplers[domain], step)[0] for domain in model.domains]
    prompts = [part[: max(1, len(part) // share)] for part in prompts]
    labels = [part.new_full((len(part),), index) for index, part in enumerate(prompts)]
    return torch.cat(prompts), torch.cat(labels)


@torch.no_grad()
def dispatch_accuracy(
    model: TransformerSquared, samplers: Mapping[str, Sampler], *, strategy: str, num_batches: int
) -> float:
    """Return the share of prompts whose own domain a strategy scores highest."""
    right = []
    for step in range(num_batches):
        prompts, labels = _labelled(model, samplers, step)
        right.append((model.dispatcher.scores(model, prompts, strategy).argmax(dim=-1) == labels).float())
    return torch.cat(right).mean().item()


def train_classifier(model: TransformerSquared, training: Mapping[str, Sampler], *, num_batches: int) -> None:
    """Fit `model.classifier` to tell the domains' prompts apart by cross-entropy, on features of the
    base that are computed once."""
    with torch.no_grad():
        batches = [_labelled(model, training, step) for step in range(num_batches)]
        inputs = torch.cat([model.dispatcher.pooled_features(model, prompts) for prompts, _ in batches])
        labels = torch.cat([labels for _, labels in batches])
    model.classifier.requires_grad_(True)
    optimizer = torch.optim.Adam(model.classifier.parameters(), lr=CLASSIFIER_RATE)
    for _ in range(CLASSIFIER_STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model.classifier(inputs), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    model.classifier.requires_grad_(False)


def train_classification_expert(
    model: TransformerSquared,
    training: Mapping[str, Sampler],
    *,
    num_steps: int,
    learning_rate: float,
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """Train the expert under which the model is asked for the domain, by the cross-entropy of the domains'
    letters. A step sees one batch in all, as many prompts of every domain."""
    expert = model.dispatcher.expert.requires_grad_(True)
    optimizer = torch.optim.Adam([expert], lr=learning_rate)
    for step in range(num_steps):
        prompts, labels = _labelled(model, training, step, share=len(model.domains))
        optimizer.zero_grad()
        scores = model.dispatcher.scores(model, prompts, "classification_expert")
        F.cross_entropy(scores, labels).backward()
        optimizer.step()
        on_step()
    optimizer.zero_grad()
    expert.requires_grad_(False)


def cross_entropy_method(
    score: Callable[[Tensor], Tensor], num_weights: int, settings: FewShot, generator: torch.Generator
) -> Tensor:
    """Return the best weights (E,) in [0, 1] that were seen.

    score: (population, E) -> (population, 2), compared by the first number and where it is equal by the
    second. The start is a normal distribution around 1 / E, half as wide as the interval; samples are
    clamped to it, and the best so far is scored again in each iteration, as in the public code. That the
    second number also decides among the elites is ours.
    """
    mean = torch.full((num_weights,), 1.0 / num_weights, dtype=torch.float64)
    deviation, best = torch.full_like(mean, 0.5), mean.clone()
    for _ in range(settings.num_iterations):
        noise = torch.randn(settings.population, num_weights, generator=generator, dtype=torch.float64)
        samples = (mean + deviation * noise).clamp(0.0, 1.0)
        samples[0] = best
        scores = score(samples).tolist()
        order = sorted(range(len(scores)), key=lambda index: scores[index], reverse=True)
        elites = samples[order[: settings.num_elites]]
        mean, deviation, best = elites.mean(dim=0), elites.std(dim=0), samples[order[0]].clone()
    return best


@torch.no_grad()
def few_shot_mixture(
    model: TransformerSquared,
    prompts: Tensor,
    answers: Tensor,
    settings: FewShot,
    *,
    max_rows: int,
    seed: int,
) -> Tensor:
    """Search the mixture (E,) under which the model answers the shots best: prompts (S, P), answers (S, A).

    Best is the share of answers that greedy decoding gives exactly, and where that is equal the mean
    log-probability of the answers. max_rows: mixtures times shots of one forward pass, one mixture at
    least.
    """
    num_shots = len(prompts)

    def score(mixtures: Tensor) -> Tensor:
        scores = []
        for part in mixtures.split(max(1, max_rows // num_shots)):
            rows = part.to(model.experts).repeat_interleave(num_shots, dim=0)
            repeated = prompts.repeat(len(part), 1), answers.repeat(len(part), 1)
            log_probs = model.answer_logits(*repeated, rows).log_softmax(dim=-1)
            chosen = log_probs.gather(-1, repeated[1][..., None])[..., 0].sum(dim=-1)
            is_exact = (log_probs.argmax(dim=-1) == repeated[1]).all(dim=-1)
            both = torch.stack((is_exact.double(), chosen.double()), dim=-1)
            scores.append(both.view(len(part), num_shots, 2).mean(dim=1).cpu())
        return torch.cat(scores)

    generator = torch.Generator().manual_seed(seed)
    return cross_entropy_method(score, len(model.domains), settings, generator)
