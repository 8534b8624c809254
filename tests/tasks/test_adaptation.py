"""The task that measures what adapting to a domain gains."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from archs.base import AdaptiveModel, Flops, Phase, State
from harness.config.build import instantiate, resolve
from harness.config.compose import compose_config
from tasks.adaptation import Adaptation
from tasks.base import TaskInputs
from tasks.data.corpus import Corpus

NAMES = ["base", "expert", "lora", "prompt", "few_shot"]
VOCAB = 5


class MixtureState(NamedTuple):
    mixture: Tensor


class Model(AdaptiveModel):
    """Answers token 1 with the right expert, token 3 with LoRA, else token 2."""

    domains = ("a", "b")
    vocab_size = VOCAB

    def __init__(self) -> None:
        super().__init__()
        self.attached = ""
        self.calls: list[tuple[str, Any]] = []

    @contextmanager
    def lora_attached(self, domain: str) -> Any:
        self.attached = domain
        yield
        self.attached = ""

    def load_base(self, weights: Mapping[str, Tensor]) -> None:
        raise AssertionError

    def num_tuned_parameters(self, adaptation: str) -> int:
        return {"base": 0, "expert": 10, "lora": 7, "prompt": 20, "few_shot": 22}[adaptation]

    def init_state(self, batch_size: int, max_context_tokens: int) -> MixtureState:
        return MixtureState(torch.zeros(batch_size, 2))

    def select_domain(self, domain: str, state: State) -> State:
        state.mixture[:, self.domains.index(domain)] = 1.0
        return state

    def dispatch(
        self, prompt: Tensor, state: State, strategy: str | None = None, target: str | None = None
    ) -> State:
        """The prompt strategy is right where the first token is even; a few shots always."""
        assert strategy is not None and target is not None
        self.calls.append((strategy, target))
        is_right = (prompt[:, 0] % 2 == 0) | (strategy == "few_shot")
        state.mixture[:, self.domains.index(target)] = is_right.float()
        return state

    def answer_logits(self, prompts: Tensor, answers: Tensor, mixture: Tensor | None = None) -> Tensor:
        assert mixture is not None
        favourite = torch.where(mixture[:, 1] > 0.5, 1, 3 if self.attached == "b" else 2)
        logits = torch.zeros(*answers.shape, VOCAB)
        return logits.scatter(-1, favourite[:, None, None].expand(*answers.shape, 1), 100.0)

    def forward(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError

    def loss(self, tokens: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def state_bytes_at(self, batch_size: int, context_tokens: int) -> int:
        return 8 * batch_size

    def flops(self, context_tokens: int, phase: Phase) -> Flops:
        return Flops()

    def prefill(self, tokens: Tensor, state: State, num_logits: int = 1) -> tuple[Tensor, State]:
        return torch.zeros(len(tokens), 1, VOCAB), state

    def decode(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        return torch.zeros(len(token), VOCAB), state


def make_examples(*, split: str, domain: str, seed: int) -> Any:
    assert split == "the test split" and seed == 5

    def examples(step: int) -> tuple[Tensor, Tensor]:
        prompts = torch.arange(4)[:, None].expand(4, 6) + 4 * step
        return prompts, torch.full((4, 2), 1)

    return examples


def new_task(**changes: Any) -> Adaptation:
    settings = {"prompts": make_examples, "domains": ["a", "b"], "adaptations": NAMES, "num_prompts": 10}
    task = Adaptation(**{**settings, "num_timed_prompts": 3, **changes})
    corpus: Any = SimpleNamespace(test="the test split")
    task.prepare(TaskInputs(corpus=corpus, tokenizer=None, device=torch.device("cpu"), seed=5))  # type: ignore[arg-type]
    return task


def test_every_domain_meets_every_adaptation() -> None:
    cells = new_task().cells()
    assert len(cells) == 10 and cells[0] == {"domain": "a", "adaptation": "base"}
    assert {cell["adaptation"] for cell in cells if cell["domain"] == "b"} == set(NAMES)


@pytest.mark.parametrize(
    ("name", "accuracy", "num_tuned", "share"),
    [
        ("base", 0.0, 0, None),
        ("expert", 1.0, 10, None),
        ("lora", 0.0, 7, None),
        ("prompt", 0.5, 20, 0.5),
        ("few_shot", 1.0, 22, None),
    ],
)
def test_an_adaptation_answers_as_it_is_adapted(
    name: str, accuracy: float, num_tuned: int, share: float | None
) -> None:
    model = Model()
    measured = new_task().measure(model, {"domain": "b", "adaptation": name})
    metrics = measured.metrics
    assert metrics.keys() == {metric.name for metric in Adaptation.METRICS}
    assert metrics["accuracy"] == accuracy == pytest.approx(metrics["answer_probability"])
    assert metrics["accuracy_low"] <= accuracy <= metrics["accuracy_high"]
    assert metrics["num_examples"] == 10 == len(measured.samples["is_correct"])
    assert metrics["num_tuned_parameters"] == num_tuned and metrics["right_domain_share"] == share
    assert len(measured.samples["second_pass_ms"]) == 3 and metrics["second_pass_ms"] > 0
    assert (
        ("first_pass_ms" in measured.samples) == (name == "prompt") == (metrics["first_pass_ms"] is not None)
    )
    expected = {(name, "b")} if name in ("prompt", "few_shot") else set()
    assert set(model.calls) == expected and model.attached == ""


@pytest.mark.parametrize("domain", ["needle", "any"])
def test_prompt_and_answer_fit_into_the_length_that_training_ends_on(corpus: Corpus, domain: str) -> None:
    config = resolve(compose_config(["arch=transformer_squared"]))
    prompts = config["arch"]["post_training"]["prompts"]
    assert config["arch"]["tasks"]["adaptation"]["prompts"] == prompts
    parts = instantiate(prompts)(split=corpus.test, domain=domain)(0)
    trained = config["train"]["stream"]["curriculum"][-1]["sequence_tokens"]
    assert 100 < sum(part.shape[1] for part in parts) <= trained


def test_lora_is_attached_for_its_own_cells_alone() -> None:
    """Token 3 is its answer: right where the examples ask for it."""

    def make_threes(**settings: Any) -> Any:
        return lambda step: (torch.zeros(4, 6, dtype=torch.long), torch.full((4, 2), 3))

    accuracies = {}
    for name in ("base", "lora", "few_shot"):
        model = Model()
        measured = new_task(prompts=make_threes).measure(model, {"domain": "b", "adaptation": name})
        accuracies[name] = measured.metrics["accuracy"]
    assert accuracies == {"base": 0.0, "lora": 1.0, "few_shot": 0.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_prompts": 0}, "num_prompts=0"),
        ({"adaptations": []}, "adaptations="),
        ({"domains": []}, "domains="),
    ],
)
def test_wrong_settings_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        new_task(**changes)
