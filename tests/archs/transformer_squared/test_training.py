"""Experts and LoRA adapters, by either method, on a problem small enough to see them learn."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from archs.attention import Attention
from archs.decoder import Decoder
from archs.transformer_squared.model import TransformerSquared
from archs.transformer_squared.policies import ExpertPolicy, LowRankPolicy
from archs.transformer_squared.training import (
    FineTuning,
    Reinforce,
    Sampler,
    Tuning,
    expected_reward,
    policy_loss,
    train_experts,
)

VOCAB = 8


def new_model() -> TransformerSquared:
    torch.manual_seed(0)
    mixers = [partial(Attention, num_heads=2)]
    base = Decoder(vocab_size=VOCAB, d_model=16, num_layers=1, d_ff=32, mixers=mixers)
    model = TransformerSquared(base=base, domains=("low", "high"))
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


def reinforce(**changes: object) -> Reinforce:
    settings = {"num_steps": 3, "learning_rate": 0.05, "gradient_clip": 1e-3, "kl_weight": 0.0}
    return Reinforce(**{**settings, **changes})


def test_experts_learn_by_reinforcement() -> None:
    model = new_model()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    steps: list[tuple[str, int]] = []
    histories = train_experts(
        model,
        TRAINING,
        VALIDATION,
        settings=reinforce(num_steps=60),
        on_step=lambda domain, step: steps.append((domain, step)),
    )
    assert steps == [(domain, step) for domain in ("low", "high") for step in range(1, 61)]
    for domain, history in histories.items():
        assert len(history.sampled_rewards) == 60
        assert history.num_tokens == 60 * sum(tensor.numel() for tensor in TRAINING[domain](0))
        assert history.reward_after > history.reward_before + 0.2, (domain, history)
        kept = expected_reward(ExpertPolicy(model, domain), VALIDATION[domain], num_batches=4)
        assert kept == pytest.approx(history.reward_after, abs=1e-6)
        other = "high" if domain == "low" else "low"
        crossed = expected_reward(ExpertPolicy(model, other), VALIDATION[domain], num_batches=4)
        assert crossed < history.reward_after
    for name, value in model.state_dict().items():
        assert torch.equal(value, base[name]) == (name != "experts"), name
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["experts"]


def test_an_expert_is_never_worse_than_the_base() -> None:
    """Steps so large that training destroys the vector: the start is kept."""
    model = new_model()
    start = model.experts.detach().clone()
    settings = reinforce(learning_rate=1e6, evaluate_every=1)
    for history in train_experts(model, TRAINING, VALIDATION, settings=settings).values():
        assert all(reward < history.reward_before for _, reward in history.validation_rewards[1:])
        assert history.best_step == 0 and history.reward_after == history.reward_before
    assert torch.equal(model.experts, start)


def test_the_same_seed_gives_the_same_experts() -> None:
    models = [new_model(), new_model(), new_model()]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        train_experts(model, TRAINING, VALIDATION, settings=reinforce(evaluate_every=1), seed=seed)
    assert torch.equal(models[0].experts, models[1].experts)
    assert not torch.equal(models[0].experts, models[2].experts)


def test_sampling_follows_the_model_at_temperature_one() -> None:
    model = new_model()
    prompts = torch.tensor([[1, 2, 3]]).expand(4000, 3)
    generator = torch.Generator().manual_seed(0)
    sampled = ExpertPolicy(model, "low").sample(prompts, num_tokens=2, generator=generator)
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
            ExpertPolicy(model, "low"),
            prompts[:1],
            answers[answer : answer + 1],
            rewards[answer : answer + 1],
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
        policy = ExpertPolicy(model, "low")
        return policy_loss(policy, prompts, answers, rewards, kl_weight=kl_weight, use_baseline=True).item()

    with torch.no_grad():
        log_p = model(prompts, model.domain_mixture("low", 32))[:, -1].log_softmax(dim=-1)
        log_q = model(prompts)[:, -1].log_softmax(dim=-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean().item()
    assert divergence > 1e-4
    assert loss(0.0) == pytest.approx(0.0, abs=1e-12)
    assert loss(0.3) == pytest.approx(0.3 * divergence)


def test_wrong_samplers_and_counts_are_errors() -> None:
    with pytest.raises(ValueError, match="validation has samplers for"):
        train_experts(new_model(), TRAINING, {"low": TRAINING["low"]}, settings=reinforce())
    for name, value in (("num_steps", 0), ("learning_rate", -1.0), ("kl_weight", -0.1)):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            reinforce(**{name: value})


def test_the_divergence_is_that_of_whole_answers() -> None:
    """Summed over an answer's tokens: twice the tokens of equal divergence have twice the penalty."""
    model = new_model().double()
    with torch.no_grad():
        model.experts[0] += 0.5
    policy, rewards = ExpertPolicy(model, "low"), torch.ones(32, dtype=torch.float64)
    prompts, answers = TRAINING["low"](0)
    answers = torch.cat((answers, (answers + 1) % VOCAB), dim=1)
    loss = policy_loss(policy, prompts, answers, rewards, kl_weight=1.0, use_baseline=True).item()
    with torch.no_grad():
        log_p = policy.answer_logits(prompts, answers).log_softmax(dim=-1)
        log_q = model.answer_logits(prompts, answers).log_softmax(dim=-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(dim=(1, 2)).mean().item()
    assert expected > 1e-3 and loss == pytest.approx(expected)


def test_a_large_penalty_keeps_the_expert_at_the_base() -> None:
    moved = []
    for kl_weight in (0.0, 100.0):
        model = new_model()
        train_experts(
            model,
            TRAINING,
            VALIDATION,
            settings=reinforce(num_steps=20, kl_weight=kl_weight),
        )
        prompts = VALIDATION["low"](0)[0]
        with torch.no_grad():
            base, tuned = (model(prompts, m)[:, -1] for m in (None, model.domain_mixture("low", 32)))
        moved.append((base.softmax(-1) - tuned.softmax(-1)).abs().mean().item())
    assert moved[1] < 0.5 * moved[0]


FINE_TUNING = FineTuning(num_steps=40, learning_rate=0.05, gradient_clip=1.0)


@pytest.mark.parametrize("policy_type", [ExpertPolicy, LowRankPolicy])
@pytest.mark.parametrize("settings", [reinforce(num_steps=60, kl_weight=0.1), FINE_TUNING])
def test_both_methods_train_experts_and_lora(policy_type: type, settings: Tuning) -> None:
    model = new_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    histories = train_experts(model, TRAINING, VALIDATION, settings=settings, policy_type=policy_type)
    for domain, history in histories.items():
        assert history.reward_after > history.reward_before + 0.2, (domain, history)
        policy = policy_type(model, domain)
        kept = expected_reward(policy, VALIDATION[domain], num_batches=4)
        assert kept == pytest.approx(history.reward_after, abs=1e-6)
        assert bool(history.sampled_rewards) == isinstance(settings, Reinforce)
    changed = {n.partition(".")[0] for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == ({"experts"} if policy_type is ExpertPolicy else {"lora"})
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["experts"]


def test_fine_tuning_lowers_the_cross_entropy_of_the_answers() -> None:
    model = new_model()
    policy, (prompts, answers) = ExpertPolicy(model, "low"), TRAINING["low"](0)
    loss, reward = FINE_TUNING.loss(policy, prompts, answers, torch.Generator())
    expected = -model(prompts)[:, -1].log_softmax(-1)[torch.arange(32), answers[:, 0]].mean()
    assert reward is None and loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_sampling_under_lora_follows_its_adapter() -> None:
    model = new_model()
    with torch.no_grad():
        model.lora.b[0][model.domains.index("high")] += 3.0
    prompts = torch.tensor([[1, 2, 3]]).expand(2000, 3)
    policy = LowRankPolicy(model, "high")
    sampled = policy.sample(prompts, num_tokens=1, generator=torch.Generator().manual_seed(0))[:, 0]
    with torch.no_grad():
        adapted = policy.answer_logits(prompts[:1], sampled[:1, None])[0, 0].softmax(-1)
        base = model(prompts[:1])[0, -1].softmax(-1)
    frequencies = torch.bincount(sampled, minlength=VOCAB) / 2000
    torch.testing.assert_close(frequencies, adapted, rtol=0, atol=0.04)
    assert (adapted - base).abs().max() > 0.1
