"""Training of Transformer²'s experts by REINFORCE, and of the classifier that chooses among them
(Sun, Cetin and Tang 2025, arXiv 2501.06252, sections 3.1 and 3.2).

Knows no data: a domain is a function that gives prompts and the answers that are right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs.base import State

#: step number -> prompts (B, P) and answers (B, A), the same ones whenever asked for that step.
Sampler = Callable[[int], tuple[Tensor, Tensor]]


class AdaptiveModel(Protocol):
    """What the training needs beside `archs.base.SequenceModel`; see archs.transformer_squared."""

    domains: tuple[str, ...]
    experts: nn.Parameter
    classifier: nn.Linear

    def domain_mixture(self, domain: str, batch_size: int) -> Tensor: ...
    def answer_logits(self, prompts: Tensor, answers: Tensor, mixture: Tensor | None = None) -> Tensor: ...
    def pooled_features(self, prompt: Tensor) -> Tensor: ...
    def init_state(self, batch_size: int, max_context_tokens: int) -> State: ...
    def select_domain(self, domain: str, state: State) -> State: ...
    def prefill(self, tokens: Tensor, state: State, num_logits: int = 1) -> tuple[Tensor, State]: ...
    def decode(self, token: Tensor, state: State) -> tuple[Tensor, State]: ...


class ExpertHistory(NamedTuple):
    """What one domain's training did. Rewards are means and lie between -1 and 1.

    sampled_rewards:    of the sampled answers, one number a step.
    validation_rewards: (step, expected reward) in order; step 0 is the base.
    best_step:          the step whose vector was kept; 0 where nothing beat the base.
    num_tokens:         of prompts and sampled answers that its steps learned from.
    """

    sampled_rewards: list[float]
    validation_rewards: list[tuple[int, float]]
    best_step: int
    num_tokens: int

    @property
    def reward_before(self) -> float:
        """Of the base on the validation batches."""
        return self.validation_rewards[0][1]

    @property
    def reward_after(self) -> float:
        """Of the kept vector, on the same validation batches that it was chosen on."""
        return max(reward for _, reward in self.validation_rewards)


class ExpertTraining(NamedTuple):
    """histories by domain; the classifier's share of right choices on the validation prompts."""

    histories: dict[str, ExpertHistory]
    classifier_accuracy: float


def _batch(model: AdaptiveModel, sampler: Sampler, step: int) -> tuple[Tensor, Tensor]:
    prompts, answers = sampler(step)
    return prompts.to(model.experts.device), answers.to(model.experts.device)


@torch.no_grad()
def sample_answers(
    model: AdaptiveModel, prompts: Tensor, *, domain: str, num_tokens: int, generator: torch.Generator
) -> Tensor:
    """prompts (B, P) -> continuations (B, num_tokens), sampled at temperature 1 under the expert."""
    batch_size, prompt_tokens = prompts.shape
    state = model.select_domain(domain, model.init_state(batch_size, prompt_tokens + num_tokens))
    logits, state = model.prefill(prompts, state)
    logits, sampled = logits[:, -1], []
    for step in range(num_tokens):
        probabilities = logits.float().softmax(dim=-1)
        sampled.append(torch.multinomial(probabilities, 1, generator=generator)[:, 0])
        if step < num_tokens - 1:
            logits, state = model.decode(sampled[-1], state)
    return torch.stack(sampled, dim=1)


@torch.no_grad()
def expected_reward(model: AdaptiveModel, sampler: Sampler, *, domain: str, num_batches: int) -> float:
    """2 p(answer | prompt) - 1, the mean over the batches: what sampling at temperature 1 earns in
    expectation, without the noise of sampling."""
    rewards = []
    for step in range(num_batches):
        prompts, answers = _batch(model, sampler, step)
        mixture = model.domain_mixture(domain, prompts.shape[0])
        log_probs = model.answer_logits(prompts, answers, mixture).log_softmax(dim=-1)
        answer_log_prob = log_probs.gather(-1, answers[..., None])[..., 0].sum(dim=-1)
        rewards.append(2.0 * answer_log_prob.exp().mean().item() - 1.0)
    return sum(rewards) / num_batches


def policy_loss(
    model: AdaptiveModel,
    prompts: Tensor,
    sampled: Tensor,
    rewards: Tensor,
    *,
    domain: str,
    kl_weight: float,
    use_baseline: bool,
) -> Tensor:
    """-mean(advantage log p(sampled | prompt)) + kl_weight KL(expert || base), eq. 1 of the paper.

    prompts (B, P), sampled (B, A), rewards (B,) of +-1 -> scalar.
    """
    mixture = model.domain_mixture(domain, prompts.shape[0])
    log_probs = model.answer_logits(prompts, sampled, mixture).log_softmax(dim=-1)
    chosen = log_probs.gather(-1, sampled[..., None])[..., 0].sum(dim=-1)
    advantages = rewards - rewards.mean() if use_baseline else rewards
    loss = -(advantages * chosen).mean()
    if kl_weight:
        with torch.no_grad():
            base = model.answer_logits(prompts, sampled).log_softmax(dim=-1)
        loss = (
            loss + kl_weight * F.kl_div(base, log_probs, log_target=True, reduction="sum") / sampled.numel()
        )
    return loss


def train_expert(
    model: AdaptiveModel,
    domain: str,
    training: Sampler,
    validation: Sampler,
    *,
    num_steps: int,
    learning_rate: float,
    gradient_clip: float,
    kl_weight: float,
    use_baseline: bool,
    evaluate_every: int,
    num_validation_batches: int,
    seed: int,
    on_step: Callable[[str, int], None] | None,
) -> ExpertHistory:
    """Trains one row of `model.experts` in place and keeps the best of its evaluations, the start
    included. Arguments as `train_experts`."""
    row = model.domains.index(domain)
    generator = torch.Generator(model.experts.device).manual_seed(seed)
    # The other rows' gradients are zero, and with them Adam's steps.
    optimizer = torch.optim.Adam([model.experts], lr=learning_rate)

    def evaluate() -> float:
        return expected_reward(model, validation, domain=domain, num_batches=num_validation_batches)

    best_reward, best_step, best_vector = evaluate(), 0, model.experts[row].detach().clone()
    validation_rewards, sampled_rewards, num_tokens = [(0, best_reward)], [], 0
    for step in range(1, num_steps + 1):
        prompts, answers = _batch(model, training, step - 1)
        sampled = sample_answers(
            model, prompts, domain=domain, num_tokens=answers.shape[1], generator=generator
        )
        rewards = 2.0 * (sampled == answers).all(dim=1).to(model.experts.dtype) - 1.0
        optimizer.zero_grad()
        policy_loss(
            model,
            prompts,
            sampled,
            rewards,
            domain=domain,
            kl_weight=kl_weight,
            use_baseline=use_baseline,
        ).backward()
        nn.utils.clip_grad_norm_([model.experts], gradient_clip)
        optimizer.step()
        sampled_rewards.append(rewards.mean().item())
        num_tokens += prompts.numel() + sampled.numel()
        if step % evaluate_every == 0 or step == num_steps:
            reward = evaluate()
            validation_rewards.append((step, reward))
            if reward > best_reward:
                best_reward, best_step = reward, step
                best_vector = model.experts[row].detach().clone()
        if on_step is not None:
            on_step(domain, step)
    with torch.no_grad():
        model.experts[row] = best_vector
    model.experts.grad = None
    return ExpertHistory(sampled_rewards, validation_rewards, best_step, num_tokens)


def train_classifier(
    model: AdaptiveModel,
    training: Mapping[str, Sampler],
    validation: Mapping[str, Sampler],
    *,
    num_batches: int,
    num_validation_batches: int,
    num_steps: int = 400,
    learning_rate: float = 3e-3,
) -> float:
    """Fits `model.classifier` to tell the domains' prompts apart by cross-entropy, on features of the
    base that are computed once; returns its accuracy on the validation prompts."""

    @torch.no_grad()
    def features(samplers: Mapping[str, Sampler], num_batches: int) -> tuple[Tensor, Tensor]:
        inputs, labels = [], []
        for domain, sampler in samplers.items():
            for step in range(num_batches):
                inputs.append(model.pooled_features(_batch(model, sampler, step)[0]))
                labels.append(inputs[-1].new_full((len(inputs[-1]),), model.domains.index(domain)))
        return torch.cat(inputs), torch.cat(labels).long()

    inputs, labels = features(training, num_batches)
    model.classifier.requires_grad_(True)
    optimizer = torch.optim.Adam(model.classifier.parameters(), lr=learning_rate)
    for _ in range(num_steps):
        optimizer.zero_grad()
        F.cross_entropy(model.classifier(inputs), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    model.classifier.requires_grad_(False)
    inputs, labels = features(validation, num_validation_batches)
    with torch.no_grad():
        return (model.classifier(inputs).argmax(dim=-1) == labels).float().mean().item()


def train_experts(
    model: AdaptiveModel,
    training: Mapping[str, Sampler],
    validation: Mapping[str, Sampler],
    *,
    num_steps: int,
    learning_rate: float = 2e-3,
    gradient_clip: float = 1e-3,
    kl_weight: float = 0.0,
    use_baseline: bool = True,
    evaluate_every: int = 10,
    num_validation_batches: int = 4,
    num_classifier_batches: int = 16,
    seed: int = 0,
    on_step: Callable[[str, int], None] | None = None,
) -> ExpertTraining:
    """Trains one expert a domain, then the classifier; the base stays as it is.

    A step samples an answer to every prompt of the domain's next batch at temperature 1; the reward
    is +1 where all its tokens are right and -1 elsewhere. Adam, 2e-3 and the clip at 1e-3 are the
    public code's. Ours: the batch's mean reward as a baseline (`use_baseline`), and that the vector
    with the best expected reward on the validation batches is kept, so that an expert is never worse
    than the base there. The gradient's clip is not a limit on Adam's step, which no scale changes.

    training, validation: samplers by domain, for the model's domains; their tensors may be on any device.
    evaluate_every:       steps between two looks at the validation batches.
    on_step:              called with (domain, step) after each step.

    Raises ValueError where the samplers' domains are not the model's or a count is not positive.
    """
    for name, samplers in (("training", training), ("validation", validation)):
        if set(samplers) != set(model.domains):
            raise ValueError(
                f"{name} has samplers for {sorted(samplers)}; the model's experts are {sorted(model.domains)}"
            )
    for name, value in (
        ("num_steps", num_steps),
        ("evaluate_every", evaluate_every),
        ("num_validation_batches", num_validation_batches),
        ("num_classifier_batches", num_classifier_batches),
    ):
        if value < 1:
            raise ValueError(f"{name}={value} must be positive")
    histories = {
        domain: train_expert(
            model,
            domain,
            training[domain],
            validation[domain],
            num_steps=num_steps,
            learning_rate=learning_rate,
            gradient_clip=gradient_clip,
            kl_weight=kl_weight,
            use_baseline=use_baseline,
            evaluate_every=evaluate_every,
            num_validation_batches=num_validation_batches,
            seed=seed + index,
            on_step=on_step,
        )
        for index, domain in enumerate(model.domains)
    }
    accuracy = train_classifier(
        model,
        training,
        validation,
        num_batches=num_classifier_batches,
        num_validation_batches=num_validation_batches,
    )
    return ExpertTraining(histories, accuracy)
