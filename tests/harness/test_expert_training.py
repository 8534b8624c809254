"""REINFORCE on a problem small enough to see it learn."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from archs.attention import Attention
from archs.transformer_squared import TransformerSquared
from harness.expert_training import (
    Sampler,
    expected_reward,
    policy_loss,
    sample_answers,
    train_experts,
)

VOCAB = 8


def new_model() -> TransformerSquared:
    torch.manual_seed(0)
    model = TransformerSquared(
        vocab_size=VOCAB,
        d_model=16,
        num_layers=1,
        d_ff=32,
        mixers=[partial(Attention, num_heads=2)],
        domains=("low", "high"),
    )
    with torch.no_grad():  # a feed-forward that has a say
        for matrix in model.feed_forwards[0].matrices:
            matrix.s.mul_(3.0)
    return model


def sampler(domain: str, *, offset: int, batch: int = 32) -> Sampler:
    """Prompts of small or of large tokens; the answer is 5 in the one domain, 2 in the other."""
    first, answer = (0, 5) if domain == "low" else (4, 2)

    def sample(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(offset + step)
        prompts = torch.randint(first, first + 4, (batch, 6), generator=generator)
        return prompts, torch.full((batch, 1), answer)

    return sample


TRAINING = {domain: sampler(domain, offset=0) for domain in ("low", "high")}
VALIDATION = {domain: sampler(domain, offset=10_000) for domain in ("low", "high")}


def test_experts_learn_and_dispatch_finds_them() -> None:
    model = new_model()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    steps: list[tuple[str, int]] = []
    training = train_experts(
        model,
        TRAINING,
        VALIDATION,
        num_steps=60,
        learning_rate=0.05,
        on_step=lambda domain, step: steps.append((domain, step)),
    )
    assert steps == [(domain, step) for domain in ("low", "high") for step in range(1, 61)]
    for domain, history in training.histories.items():
        assert len(history.sampled_rewards) == 60
        assert history.num_tokens == 60 * sum(tensor.numel() for tensor in TRAINING[domain](0))
        assert history.reward_after > history.reward_before + 0.2, (domain, history)
        kept = expected_reward(model, VALIDATION[domain], domain=domain, num_batches=4)
        assert kept == pytest.approx(history.reward_after, abs=1e-6)
        other = "high" if domain == "low" else "low"
        crossed = expected_reward(model, VALIDATION[domain], domain=other, num_batches=4)
        assert crossed < history.reward_after
    assert training.classifier_accuracy == 1.0
    state = model.dispatch(VALIDATION["high"](9)[0], model.init_state(32, 8))
    assert state.mixture.tolist() == [[0.0, 1.0]] * 32
    learned = ("experts", "classifier.weight", "classifier.bias")
    for name, value in model.state_dict().items():
        assert torch.equal(value, base[name]) == (name not in learned), name


def test_an_expert_is_never_worse_than_the_base() -> None:
    """Steps so large that training destroys the vector: the start is kept."""
    model = new_model()
    start = model.experts.detach().clone()
    training = train_experts(model, TRAINING, VALIDATION, num_steps=3, learning_rate=1e6, evaluate_every=1)
    for history in training.histories.values():
        assert all(reward < history.reward_before for _, reward in history.validation_rewards[1:])
        assert history.best_step == 0 and history.reward_after == history.reward_before
    assert torch.equal(model.experts, start)


def test_the_same_seed_gives_the_same_experts() -> None:
    models = [new_model(), new_model(), new_model()]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        train_experts(
            model, TRAINING, VALIDATION, num_steps=3, learning_rate=0.05, evaluate_every=1, seed=seed
        )
    assert torch.equal(models[0].experts, models[1].experts)
    assert not torch.equal(models[0].experts, models[2].experts)


def test_sampling_follows_the_model_at_temperature_one() -> None:
    model = new_model()
    prompts = torch.tensor([[1, 2, 3]]).expand(4000, 3)
    generator = torch.Generator().manual_seed(0)
    sampled = sample_answers(model, prompts, domain="low", num_tokens=2, generator=generator)
    assert sampled.shape == (4000, 2)
    with torch.no_grad():
        first = model(prompts[:1])[0, -1].softmax(dim=-1)
        pairs = torch.cartesian_prod(torch.arange(VOCAB), torch.arange(VOCAB))
        log_probs = model.answer_logits(prompts[: VOCAB**2], pairs).log_softmax(dim=-1)
        joint = log_probs.gather(-1, pairs[..., None]).sum(dim=(1, 2)).exp()
    frequencies = torch.bincount(sampled[:, 0], minlength=VOCAB) / 4000
    torch.testing.assert_close(frequencies, first, rtol=0, atol=0.03)
    pair_frequencies = torch.bincount(sampled[:, 0] * VOCAB + sampled[:, 1], minlength=VOCAB**2) / 4000
    torch.testing.assert_close(pair_frequencies, joint, rtol=0, atol=0.02)


def test_the_policy_gradient_is_unbiased() -> None:
    """Summed over all answers with their probabilities it is the gradient of the expected reward."""
    model = new_model().double()
    prompts = torch.tensor([[1, 2, 3]]).expand(VOCAB, 3)
    answers = torch.arange(VOCAB)[:, None]
    rewards = torch.where(answers[:, 0] == 5, 1.0, -1.0).double()
    mixture = model.domain_mixture("low", VOCAB)
    probabilities = model.answer_logits(prompts, answers, mixture)[0, 0].softmax(dim=-1)
    (expected,) = torch.autograd.grad((probabilities * rewards).sum(), model.experts)
    estimate = torch.zeros_like(expected)
    for answer in range(VOCAB):
        loss = policy_loss(
            model,
            prompts[:1],
            answers[answer : answer + 1],
            rewards[answer : answer + 1],
            domain="low",
            kl_weight=0.0,
            use_baseline=False,
        )
        (gradient,) = torch.autograd.grad(loss, model.experts)
        estimate -= probabilities[answer].item() * gradient
    assert expected.norm() > 1e-3
    torch.testing.assert_close(estimate, expected, rtol=1e-8, atol=1e-10)


def test_the_divergence_from_the_base_is_weighed_in() -> None:
    model = new_model().double()
    with torch.no_grad():
        model.experts[0] += 0.5
    prompts, answers = TRAINING["low"](0)

    def loss(kl_weight: float) -> float:
        rewards = torch.ones(32, dtype=torch.float64)  # no advantage over the baseline
        return policy_loss(
            model, prompts, answers, rewards, domain="low", kl_weight=kl_weight, use_baseline=True
        ).item()

    with torch.no_grad():
        log_p = model(prompts, model.domain_mixture("low", 32))[:, -1].log_softmax(dim=-1)
        log_q = model(prompts)[:, -1].log_softmax(dim=-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean().item()
    assert divergence > 1e-4
    assert loss(0.0) == pytest.approx(0.0, abs=1e-12)
    assert loss(0.3) == pytest.approx(0.3 * divergence)


def test_wrong_samplers_and_counts_are_errors() -> None:
    with pytest.raises(ValueError, match="validation has samplers for"):
        train_experts(new_model(), TRAINING, {"low": TRAINING["low"]}, num_steps=1)
    with pytest.raises(ValueError, match="num_steps=0"):
        train_experts(new_model(), TRAINING, VALIDATION, num_steps=0)
