"""Training of Transformer²'s experts, and of LoRA adapters beside them, by REINFORCE or by plain fine-tuning
(Sun, Cetin and Tang 2025, arXiv 2501.06252, section 3.1).

Knows no data: a domain is a function that gives prompts and the answers that are right.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs.base import Sampler
from archs.transformer_squared.model import TransformerSquared
from archs.transformer_squared.policies import ExpertPolicy, Policy

Method = Literal["reinforce", "fine_tuning"]


class ExpertHistory(NamedTuple):
    """The course of one domain's training. Rewards are means and lie between -1 and 1.

    sampled_rewards:    of REINFORCE's sampled answers, one number a step; empty for fine-tuning.
    validation_rewards: (step, expected reward) in order; step 0 is the base.
    best_step:          the step whose parameters were kept; 0 where nothing beat the base.
    num_tokens:         of prompts and answers that its steps learned from.
    """

    sampled_rewards: list[float]
    validation_rewards: list[tuple[int, float]]
    best_step: int
    num_tokens: int

    @property
    def reward_before(self) -> float:
        """Return the base's reward on the validation batches."""
        return self.validation_rewards[0][1]

    @property
    def reward_after(self) -> float:
        """Return the kept parameters' reward, on the validation batches that chose them."""
        return max(reward for _, reward in self.validation_rewards)


@dataclass(frozen=True, kw_only=True)
class Tuning(ABC):
    """Settings for training one domain's parameters: Adam at a constant rate.

    gradient_clip:          of the gradient's norm. It is no limit on Adam's step, which no scale changes.
    evaluate_every:         steps between two looks at the validation batches; what did best there is kept,
                            the start included, so that an expert is never worse than the base there.

    Raises ValueError where a number is not positive.
    """

    num_steps: int
    learning_rate: float
    gradient_clip: float
    evaluate_every: int = 10
    num_validation_batches: int = 4

    def __post_init__(self) -> None:
        for name in ("num_steps", "learning_rate", "gradient_clip", "evaluate_every"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.num_validation_batches < 1:
            raise ValueError(f"num_validation_batches={self.num_validation_batches} must be positive")

    @abstractmethod
    def loss(
        self, policy: Policy, prompts: Tensor, answers: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, float | None]:
        """prompts (B, P), right answers (B, A) -> a scalar to minimise, and the mean reward of what was
        sampled, if anything was."""


@dataclass(frozen=True, kw_only=True)
class Reinforce(Tuning):
    """Eq. 1 of the paper: an answer to every prompt is sampled at temperature 1, its reward is +1 where all
    its tokens are right and -1 elsewhere, and the divergence from the base is a penalty.

    kl_weight:    lambda. The paper's appendix tries 0, 0.1, 0.2 and 0.3 and keeps what validates best; the
                  public code's default is 0.
    use_baseline: the batch's mean reward is subtracted, which is ours. The learning rate of 2e-3 and the
                  clip at 1e-3 in conf/ are the public code's.

    Raises ValueError where a number is out of its range.
    """

    kl_weight: float = 0.1
    use_baseline: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.kl_weight < math.inf:
            raise ValueError(f"kl_weight={self.kl_weight} must not be negative")

    def loss(
        self, policy: Policy, prompts: Tensor, answers: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, float | None]:
        sampled = policy.sample(prompts, num_tokens=answers.shape[1], generator=generator)
        rewards = 2.0 * (sampled == answers).all(dim=1).float() - 1.0
        loss = policy_loss(
            policy, prompts, sampled, rewards, kl_weight=self.kl_weight, use_baseline=self.use_baseline
        )
        return loss, rewards.mean().item()


@dataclass(frozen=True, kw_only=True)
class FineTuning(Tuning):
    """Next-token prediction of the right answers: the mean cross-entropy of their tokens, in nats."""

    def loss(
        self, policy: Policy, prompts: Tensor, answers: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, float | None]:
        logits = policy.answer_logits(prompts, answers)
        return F.cross_entropy(logits.flatten(0, 1).float(), answers.flatten()), None


def policy_loss(
    policy: Policy,
    prompts: Tensor,
    sampled: Tensor,
    rewards: Tensor,
    *,
    kl_weight: float,
    use_baseline: bool,
) -> Tensor:
    """-mean(advantage log p(sampled | prompt)) + kl_weight KL(policy || base), eq. 1 of the paper.

    prompts (B, P), sampled (B, A), rewards (B,) of +-1 -> scalar. The divergence is that of the answers:
    summed over their tokens, the mean over prompts.
    """
    log_probs = policy.answer_logits(prompts, sampled).log_softmax(dim=-1)
    chosen = log_probs.gather(-1, sampled[..., None])[..., 0].sum(dim=-1)
    advantages = rewards - rewards.mean() if use_baseline else rewards
    loss = -(advantages * chosen).mean()
    if kl_weight:
        with torch.no_grad():
            base = policy.model.answer_logits(prompts, sampled).log_softmax(dim=-1)
        divergence = F.kl_div(base, log_probs, log_target=True, reduction="sum") / len(prompts)
        loss = loss + kl_weight * divergence
    return loss


def batch_of(model: TransformerSquared, sampler: Sampler, step: int) -> tuple[Tensor, Tensor]:
    """Return a sampler's batch on the model's device."""
    prompts, answers = sampler(step)
    return prompts.to(model.experts.device), answers.to(model.experts.device)


@torch.no_grad()
def expected_reward(policy: Policy, sampler: Sampler, *, num_batches: int) -> float:
    """2 p(answer | prompt) - 1, the mean over the batches: what sampling at temperature 1 earns in
    expectation, without the noise of sampling."""
    rewards = []
    for step in range(num_batches):
        prompts, answers = batch_of(policy.model, sampler, step)
        log_probs = policy.answer_logits(prompts, answers).log_softmax(dim=-1)
        answer_log_prob = log_probs.gather(-1, answers[..., None])[..., 0].sum(dim=-1)
        rewards.append(2.0 * answer_log_prob.exp().mean().item() - 1.0)
    return sum(rewards) / num_batches


def tune(
    policy: Policy,
    training: Sampler,
    validation: Sampler,
    *,
    settings: Tuning,
    seed: int,
    on_step: Callable[[str, int], None] | None = None,
) -> ExpertHistory:
    """Train one domain's parameters in place and keep the best of the evaluations, the start
    included. Arguments as `train_experts`."""
    generator = torch.Generator(policy.model.experts.device).manual_seed(seed)
    parameters = policy.parameters
    needed_grad = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    # The other domains' gradients are zero, and with them Adam's steps.
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)

    def evaluate() -> float:
        return expected_reward(policy, validation, num_batches=settings.num_validation_batches)

    best_reward, best_step, best_values = evaluate(), 0, policy.get()
    validation_rewards, sampled_rewards, num_tokens = [(0, best_reward)], [], 0
    for step in range(1, settings.num_steps + 1):
        prompts, answers = batch_of(policy.model, training, step - 1)
        optimizer.zero_grad()
        loss, reward = settings.loss(policy, prompts, answers, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, settings.gradient_clip)
        optimizer.step()
        sampled_rewards += [] if reward is None else [reward]
        num_tokens += prompts.numel() + answers.numel()
        if step % settings.evaluate_every == 0 or step == settings.num_steps:
            validation_rewards.append((step, evaluate()))
            if validation_rewards[-1][1] > best_reward:
                best_reward, best_step, best_values = validation_rewards[-1][1], step, policy.get()
        if on_step is not None:
            on_step(policy.domain, step)
    policy.put(best_values)
    optimizer.zero_grad()
    for parameter, needed in zip(parameters, needed_grad, strict=True):
        parameter.requires_grad_(needed)
    return ExpertHistory(sampled_rewards, validation_rewards, best_step, num_tokens)


def train_experts(
    model: TransformerSquared,
    training: Mapping[str, Sampler],
    validation: Mapping[str, Sampler],
    *,
    settings: Tuning,
    policy_type: type[Policy] = ExpertPolicy,
    seed: int = 0,
    on_step: Callable[[str, int], None] | None = None,
) -> dict[str, ExpertHistory]:
    """Train one expert per domain, or what else `policy_type` tunes; the base stays as it is.

    training, validation: samplers by domain, for the model's domains; their tensors may be on any device.
    on_step:              called with (domain, step) after each step.

    Raises ValueError where the samplers' domains are not the model's.
    """
    for name, samplers in (("training", training), ("validation", validation)):
        if set(samplers) != set(model.domains):
            raise ValueError(
                f"{name} has samplers for {sorted(samplers)}; the model's experts are {sorted(model.domains)}"
            )
    return {
        domain: tune(
            policy_type(model, domain),
            training[domain],
            validation[domain],
            settings=settings,
            seed=seed + index,
            on_step=on_step,
        )
        for index, domain in enumerate(model.domains)
    }
