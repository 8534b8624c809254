"""What the first pass learns: to find the domain, and mixtures from a few examples."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from archs.attention import Attention
from archs.decoder import Decoder
from archs.transformer_squared.dispatch_training import (
    DispatchTraining,
    FewShot,
    cross_entropy_method,
    dispatch_accuracy,
    few_shot_mixture,
    train_classification_expert,
    train_classifier,
)
from archs.transformer_squared.model import TransformerSquared
from archs.transformer_squared.training import Sampler

DOMAINS = ("low", "high")


def new_model() -> TransformerSquared:
    torch.manual_seed(0)
    mixers = [partial(Attention, num_heads=2)]
    base = Decoder(vocab_size=8, d_model=16, num_layers=1, d_ff=32, mixers=mixers)
    model = TransformerSquared(base=base, domains=DOMAINS, classification_prompt=([0, 4], [1, 6]))
    with torch.no_grad():  # a feed-forward that has a say
        for matrix in model.matrices:
            matrix.s.mul_(3.0)
    return model


def sampler(domain: str, *, offset: int) -> Sampler:
    """Prompts of small or of large tokens; the answer is 5 in the one domain, 2 in the other."""
    first, answer = (0, 5) if domain == "low" else (4, 2)

    def sample(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(offset + step)
        return torch.randint(first, first + 4, (32, 6), generator=generator), torch.full((32, 1), answer)

    return sample


TRAINING = {domain: sampler(domain, offset=0) for domain in DOMAINS}
VALIDATION = {domain: sampler(domain, offset=10_000) for domain in DOMAINS}


def changed(model: TransformerSquared, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def test_the_classifier_learns_to_tell_the_domains_apart() -> None:
    model = new_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_classifier(model, TRAINING, num_batches=16)
    assert dispatch_accuracy(model, VALIDATION, strategy="classifier", num_batches=4) == 1.0
    assert changed(model, before) == {"dispatcher.classifier.weight", "dispatcher.classifier.bias"}
    state = model.dispatch(VALIDATION["high"](9)[0], model.init_state(32, 8))
    assert state.mixture.tolist() == [[0.0, 1.0]] * 32


def test_the_classification_expert_learns_to_answer_the_question() -> None:
    model = new_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = {"strategy": "classification_expert", "num_batches": 4}
    untrained = dispatch_accuracy(model, VALIDATION, **settings)
    train_classification_expert(model, TRAINING, num_steps=100, learning_rate=0.05)
    assert dispatch_accuracy(model, VALIDATION, **settings) > max(0.9, untrained + 0.1)
    assert changed(model, before) == {"dispatcher.expert"}
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["experts"]


@pytest.mark.parametrize("optimum", [[0.2, 0.9, 0.6], [0.0, 1.0, 0.5], [-1.0, 2.0, 0.5]])
def test_the_cross_entropy_method_finds_an_optimum_in_the_box(optimum: list[float]) -> None:
    target, seen = torch.tensor(optimum, dtype=torch.float64), []

    def score(weights: Tensor) -> Tensor:
        seen.append(weights)
        distance = (weights - target).pow(2).sum(dim=1)
        return torch.stack((torch.zeros_like(distance), -distance), dim=1)  # the second decides

    best = cross_entropy_method(score, 3, FewShot(num_iterations=30), torch.Generator().manual_seed(0))
    torch.testing.assert_close(best, target.clamp(0, 1), rtol=0, atol=0.02)
    assert {weights.shape for weights in seen} == {(32, 3)} and len(seen) == 30
    assert all(weights.min() >= 0 and weights.max() <= 1 for weights in seen)
    assert torch.equal(seen[0][0], torch.full((3,), 1 / 3, dtype=torch.float64))


def test_the_first_score_decides_before_the_second() -> None:
    def score(weights: Tensor) -> Tensor:
        return torch.stack(((weights[:, 0] > 0.8).double(), -weights[:, 0]), dim=1)

    best = cross_entropy_method(score, 2, FewShot(num_iterations=20), torch.Generator().manual_seed(0))
    assert 0.8 < best[0] < 0.85


@torch.no_grad()
def test_a_few_examples_find_the_expert_that_answers_them() -> None:
    model = new_model()
    direction = torch.randn(model.experts.shape[1], generator=torch.Generator().manual_seed(1))
    prompts = TRAINING["low"](0)[0][:10]
    for index in range(2):  # opposite experts; the examples are what the second one says
        model.experts[index] = 1.0 + (1.5 if index else -1.5) * direction
    answers = model(prompts, model.domain_mixture("high", 10))[:, -1:].argmax(-1)
    settings = FewShot(num_iterations=10)
    for max_rows in (1, 1000):
        mixture = few_shot_mixture(model, prompts, answers, settings, max_rows=max_rows, seed=0)
        found = mixture.float().expand(10, -1)
        log_probs = model.answer_logits(prompts, answers, found).log_softmax(-1)
        base = model.answer_logits(prompts, answers).log_softmax(-1)
        assert (log_probs[:, 0].argmax(-1) == answers[:, 0]).float().mean() == 1.0
        gained = (log_probs - base).gather(-1, answers[..., None]).mean()
        assert gained > 0 and mixture[1] > mixture[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"population": 0}, "population=0"),
        ({"elite_share": 0.01}, "elite_share=0.01"),
        ({"elite_share": 1.5}, "elite_share=1.5"),
        ({"num_shots": 0}, "num_shots=0"),
    ],
)
def test_wrong_settings_of_the_search_are_errors(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FewShot(**settings)


def test_wrong_settings_of_the_dispatch_are_errors() -> None:
    settings = {"num_classifier_batches": 1, "num_validation_batches": 1, "num_expert_steps": 1}
    with pytest.raises(ValueError, match=r"expert_learning_rate=0\.0 must be positive"):
        DispatchTraining(**settings, expert_learning_rate=0.0)
