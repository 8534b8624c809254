"""The needle task on models whose accuracy is known."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from tasks.base import Measurement, TaskInputs
from tasks.needle import Needle
from tests.tasks.conftest import CopyModel, ReaderModel


def measure(
    inputs: TaskInputs, model: ReaderModel, context_tokens: int = 256, depth: float = 0.5, **settings: Any
) -> Measurement:
    defaults: dict[str, Any] = {"lengths_tokens": [context_tokens], "depths": [depth], "num_examples": 6}
    task = Needle(**{**defaults, **settings})
    task.prepare(inputs)
    return task.measure(model, {"context_tokens": context_tokens, "depth": depth})


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("context_tokens", [255, 256, 1024])
def test_a_model_that_copies_is_always_right(inputs: TaskInputs, context_tokens: int, depth: float) -> None:
    result = measure(inputs, CopyModel(), context_tokens, depth)
    assert result.metrics["accuracy"] == 1.0 == result.metrics["accuracy_high"]
    assert result.metrics["accuracy_low"] == pytest.approx(0.6097, abs=1e-3)
    assert result.metrics["answer_log_probability_nats"] > -1e-4
    assert result.samples["is_correct"] == [1] * 6


def test_a_model_that_prefers_nothing_is_never_right(inputs: TaskInputs) -> None:
    result = measure(inputs, ReaderModel())
    assert result.metrics["accuracy"] == 0.0 == result.metrics["accuracy_low"]
    expected = -4 * torch.tensor(257.0).log().item()
    assert result.metrics["answer_log_probability_nats"] == pytest.approx(expected, rel=1e-6)


def test_a_last_digit_that_is_wrong_is_wrong(inputs: TaskInputs) -> None:
    class AlmostModel(CopyModel):
        def logits_after(self, seen: list[int]) -> Tensor:
            logits = super().logits_after(seen)
            if bytes(t for t in seen[-4:] if t < 256).replace(b"=", b"")[-3:].isdigit():
                logits = logits.roll(1)
            return logits

    assert measure(inputs, AlmostModel()).metrics["accuracy"] == 0.0


def test_the_log_probability_is_the_answers_and_not_the_first_digits(inputs: TaskInputs) -> None:
    class HesitantModel(CopyModel):
        certainty = 5.0

    digit = (torch.tensor(5.0) - (torch.tensor(5.0).exp() + 256).log()).item()
    result = measure(inputs, HesitantModel())
    assert result.metrics["answer_log_probability_nats"] == pytest.approx(4 * digit, rel=1e-5)
    assert result.metrics["accuracy"] == 1.0


@pytest.mark.parametrize(("batch_tokens", "chunk_tokens"), [(1, 1000), (600, 37), (10**6, 1)])
def test_batches_and_chunks_do_not_change_the_result(
    inputs: TaskInputs, new_model: Any, batch_tokens: int, chunk_tokens: int
) -> None:
    model = new_model("transformer")
    expected = measure(inputs, model, 128, num_needles=2)
    result = measure(inputs, model, 128, num_needles=2, batch_tokens=batch_tokens, chunk_tokens=chunk_tokens)
    assert result.samples["depth_tokens"] == expected.samples["depth_tokens"]
    assert result.samples["is_correct"] == expected.samples["is_correct"]
    scores = result.samples["answer_log_probability_nats"]
    assert scores == pytest.approx(expected.samples["answer_log_probability_nats"], rel=1e-8)


def test_the_prompt_is_fed_in_chunks(inputs: TaskInputs) -> None:
    model = ReaderModel()
    measure(inputs, model, 1024, chunk_tokens=100)
    assert model.largest_chunk_tokens == 100


def test_an_adaptive_model_dispatches_on_the_prompt_without_the_answer(inputs: TaskInputs) -> None:
    model = ReaderModel(is_adaptive=True)
    result = measure(inputs, model, 256)
    assert set(model.choices) == {"dispatched on 252"}
    assert result.details["adaptation"] == "mixture that dispatch chose"


def test_a_point_says_what_the_number_is_worth(inputs: TaskInputs) -> None:
    result = measure(inputs, CopyModel(), num_needles=2, num_examples=3)
    assert result.metrics["chance_accuracy"] == 1e-4
    assert result.details["copy_chance_accuracy"] == 0.5 and result.details["num_needles"] == 2
    assert result.metrics["num_examples"] == 3 == len(result.samples["depth_tokens"])
    assert 0 < result.metrics["achieved_depth_tokens"] < 128 + 16
    json.dumps([result.metrics, result.samples, result.details])


@pytest.mark.parametrize(
    ("context_tokens", "is_trained"), [(128, 1), (200, 1), (256, 1), (257, 0), (2048, 0)]
)
def test_lengths_beyond_training_are_marked(inputs: TaskInputs, context_tokens: int, is_trained: int) -> None:
    result = measure(inputs, ReaderModel(), context_tokens, num_examples=1)
    assert result.metrics["is_trained_length"] == is_trained


def test_the_text_comes_from_the_test_split(inputs: TaskInputs) -> None:
    class ListeningModel(ReaderModel):
        heard: str = ""

        def prefill(self, tokens: Tensor, state: Any, num_logits: int = 1) -> Any:
            self.heard += bytes(tokens[0].tolist()).decode()
            return super().prefill(tokens, state, num_logits)

    model = ListeningModel()
    measure(inputs, model, 1024, depth=1.0, num_examples=1, num_needles=1)
    text = model.heard[:700]
    documents = [inputs.tokenizer.decode(inputs.corpus.test.document(i)).decode() for i in range(5)]
    assert any(text in document for document in documents)


def test_cells_are_the_grid_and_each_has_its_own_examples(inputs: TaskInputs) -> None:
    task = Needle(lengths_tokens=[512, 256], depths=[1, 0], num_examples=2)
    assert task.cells() == [
        {"context_tokens": length, "depth": depth} for length in (256, 512) for depth in (0.0, 1.0)
    ]
    task.prepare(inputs)
    first, last = (task.measure(CopyModel(), cell).samples["depth_tokens"] for cell in task.cells()[:2])
    assert first == [0, 0] and min(last) > 150


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths_tokens": [0], "depths": [0.5]}, "lengths_tokens=0 must be positive"),
        ({"lengths_tokens": [-256], "depths": [0.5]}, "lengths_tokens=-256 must be positive"),
        ({"lengths_tokens": [256], "depths": [1.5]}, r"depth=1\.5 must lie between 0 and 1"),
        ({"lengths_tokens": [256], "depths": []}, "need one value at least"),
        ({"lengths_tokens": [256], "depths": [0.5], "num_examples": 0}, "num_examples=0 must be positive"),
        ({"lengths_tokens": [256], "depths": [0.5], "batch_tokens": -1}, "batch_tokens=-1 must be positive"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Needle(**settings)


@pytest.mark.parametrize(("length", "message"), [(30, "leaves no room"), (100_000, "no document of")])
def test_lengths_that_the_text_cannot_serve_are_refused(
    inputs: TaskInputs, length: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Needle(lengths_tokens=[length], depths=[0.5]).prepare(inputs)
