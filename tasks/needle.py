"""Find a needle in a haystack: real text hides a key with a 4-digit number, and ends with a query for it.

The format is that of tasks.examples.needle, with text of the test split. Each cell of the grid of lengths and
depths has its own examples. They depend on the seed and are the same for every architecture.

Metrics of a point (cell: context_tokens, depth):
    accuracy                     share of examples whose answer greedy decoding gives exactly
    accuracy_low, accuracy_high  95% Wilson interval
    num_examples                 number of examples
    answer_log_probability_nats  mean log-probability of the whole answer, teacher forced
    chance_accuracy              accuracy of random numbers
    achieved_depth_tokens        mean number of tokens before the needle's line
    is_trained_length            1 where the context is no longer than the longest trained sequence, else 0;
                                 null where the trained lengths are not known
Samples, one per example: is_correct, answer_log_probability_nats, depth_tokens.
Details: num_needles, copy_chance_accuracy (the accuracy of copying any needle of the context without matching
the key), note, adaptation (of an adaptive model, else null).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from archs.base import SequenceModel
from archs.generate import branch, generate, read, score_answers
from harness.measure.statistics import wilson_interval
from harness.record.metrics import Metric
from tasks.base import Measurement, Task, TaskInputs, require_positive, with_interval
from tasks.examples.needle import NeedleMaker

NOTE = (
    "chance_accuracy is that of a number drawn at random; a model that copies one of the context's "
    "numbers without matching the key reaches copy_chance_accuracy."
)


class Examples(NamedTuple):
    """tokens (B, T), which end with the answer; depth_tokens, one per row."""

    tokens: Tensor
    depth_tokens: list[int]


class Needle(Task):
    """The task of this module.

    lengths_tokens: context lengths, including the query and the answer.
    depths:         places of the needle; 0 is the beginning of the text, 1 its end.
    num_examples:   examples per cell.
    num_needles:    needles per context; the query is for one of them.
    batch_tokens:   tokens run in one batch, which has at least one context.
    chunk_tokens:   tokens per prefill call.
    Raises ValueError where a number is not positive or a depth is not between 0 and 1.
    """

    name = "needle"
    METRICS = (
        *with_interval(
            Metric(
                name="accuracy",
                label="accuracy",
                unit="share",
                direction="higher",
                kind="quality",
                is_headline=True,
            )
        ),
        Metric(name="num_examples", label="examples", unit="", direction="neither", kind="quality"),
        Metric(
            name="answer_log_probability_nats",
            label="log-probability",
            unit="nats",
            direction="higher",
            kind="quality",
            tolerance=0.3,
            is_compared_on_mean=True,
        ),
        Metric(name="chance_accuracy", label="chance", unit="share", direction="neither", kind="quality"),
        Metric(
            name="achieved_depth_tokens",
            label="depth reached",
            unit="tokens",
            direction="neither",
            kind="quality",
        ),
        Metric(
            name="is_trained_length", label="trained length", unit="", direction="neither", kind="quality"
        ),
    )
    CELL_SETTINGS = ("lengths_tokens", "depths")

    def __init__(
        self,
        *,
        lengths_tokens: Sequence[int],
        depths: Sequence[float],
        num_examples: int = 20,
        num_needles: int = 4,
        batch_tokens: int = 16384,
        chunk_tokens: int = 1024,
    ) -> None:
        if not lengths_tokens or not depths:
            raise ValueError(
                f"lengths_tokens={list(lengths_tokens)} and depths={list(depths)} need one value at least."
            )
        for length in lengths_tokens:
            require_positive("tasks.needle", lengths_tokens=length)
        for depth in depths:
            if not 0.0 <= depth <= 1.0:
                raise ValueError(f"depth={depth} must lie between 0 and 1.")
        require_positive("tasks.needle", num_examples=num_examples, num_needles=num_needles)
        require_positive("tasks.needle", batch_tokens=batch_tokens, chunk_tokens=chunk_tokens)
        self.lengths_tokens, self.depths = sorted(set(lengths_tokens)), sorted(set(depths))
        self.num_examples, self.num_needles = num_examples, num_needles
        self.batch_tokens, self.chunk_tokens = batch_tokens, chunk_tokens

    def cells(self) -> list[dict[str, Any]]:
        return [
            {"context_tokens": length, "depth": float(depth)}
            for length in self.lengths_tokens
            for depth in self.depths
        ]

    def prepare(self, inputs: TaskInputs) -> None:
        """Check that contexts of all lengths can be made.

        Raises ValueError where a length leaves no room for the needles, or no test document is that long."""
        self._device, self._seed = inputs.device, inputs.seed
        self._longest_trained_tokens = max(inputs.trained_lengths_tokens, default=None)
        self._maker = NeedleMaker(split=inputs.corpus.test, num_needles=self.num_needles)
        for length in self.lengths_tokens:
            self._maker.check(length)

    @torch.no_grad()
    def measure(self, model: SequenceModel, cell: dict[str, Any]) -> Measurement:
        is_correct: list[int] = []
        log_probabilities: list[float] = []
        depth_tokens: list[int] = []
        for examples in self._batches(cell["context_tokens"], cell["depth"]):
            correct, scores = self._answer(model, examples.tokens.to(self._device))
            is_correct += [int(value) for value in correct.tolist()]
            log_probabilities += scores.tolist()
            depth_tokens += examples.depth_tokens
        low, high = wilson_interval(sum(is_correct), len(is_correct))
        longest = self._longest_trained_tokens
        return Measurement(
            metrics={
                "accuracy": sum(is_correct) / len(is_correct),
                "accuracy_low": low,
                "accuracy_high": high,
                "num_examples": len(is_correct),
                "answer_log_probability_nats": float(np.mean(log_probabilities)),
                "chance_accuracy": 1 / self._maker.num_values,
                "achieved_depth_tokens": float(np.mean(depth_tokens)),
                "is_trained_length": None if longest is None else int(cell["context_tokens"] <= longest),
            },
            samples={
                "is_correct": is_correct,
                "answer_log_probability_nats": log_probabilities,
                "depth_tokens": depth_tokens,
            },
            details={
                "num_needles": self.num_needles,
                "copy_chance_accuracy": 1 / self.num_needles,
                "note": NOTE,
                "adaptation": "mixture that dispatch chose" if model.is_adaptive else None,
            },
        )

    def _batches(self, context_tokens: int, depth: float) -> Iterator[Examples]:
        """Yield the cell's examples, which depend only on the seed and the cell."""
        num_rows = max(1, self.batch_tokens // context_tokens)
        for first in range(0, self.num_examples, num_rows):
            drawn = []
            for index in range(first, min(first + num_rows, self.num_examples)):
                rng = np.random.default_rng((self._seed, context_tokens, round(depth * 10**6), index))
                drawn.append(self._maker.draw(context_tokens, rng, depth))
            tokens = torch.from_numpy(np.stack([needles.tokens for needles in drawn]).astype(np.int64))
            yield Examples(tokens, [needles.depth_tokens for needles in drawn])

    def _answer(self, model: SequenceModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return whether greedy decoding gives each row's answer (B,), and its log-probability (B,)."""
        num_answer = self._maker.answer_tokens
        prompt, answer = tokens[:, :-num_answer], tokens[:, -num_answer:]
        state = model.dispatch(prompt, model.init_state(*tokens.shape))
        reading = read(model, prompt, state, chunk_tokens=self.chunk_tokens)
        scores = score_answers(model, branch(reading), answer)
        decoded = generate(model, reading, num_tokens=num_answer).tokens
        return (decoded == answer).all(1), scores.log_probabilities_nats.sum(1)
