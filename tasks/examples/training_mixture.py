"""Make the training stream: the same tokens in the same order for every architecture.

A batch depends only on the settings and the step, so that a run can resume at any step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tasks.data.corpus import Corpus, Split
from tasks.data.sampling import DocumentSampler
from tasks.examples.needle import NeedleMaker

#: Part of each random seed, so that training and validation draw differently.
TRAINING, VALIDATION = 0, 1


class Batch(NamedTuple):
    """One batch, on the CPU.

    tokens, targets: (B, T) int64; the targets are the next tokens.
    weights:         (B, T) float32; a weight of 0 leaves a position out of the loss.
    """

    tokens: Tensor
    targets: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum, with the settings of `TrainingStream` that hold in it.

    until_fraction: fraction of the steps that is done when the stage ends.
    """

    until_fraction: float
    sequence_tokens: int
    needle_fraction: float
    num_needles: int
    min_needles: int | None
    num_queries: int
    min_queries: int | None


class TrainingStream:
    """A mixture of windows of the training documents, and of needle contexts made from these documents.

    num_steps:          steps of the whole run, by which the stages of the curriculum are placed.
    batch_tokens:       tokens per batch, whatever the sequence length; a batch has at least one row.
    curriculum:         stages in order, each with until_fraction and sequence_tokens. A stage may have its
                        own needle_fraction, num_needles, min_needles, num_queries and min_queries. The last
                        stage ends at 1. Short stages that have only needles teach recall in the fewest steps.
    needle_fraction:    share of the rows that are needle contexts.
    num_needles, min_needles, num_queries, min_queries, max_trailing_tokens: see NeedleMaker. Several queries
                        per context make the signal denser.
    answer_weight:      weight of the tokens of an answer in the loss; text of the corpus has 1.
    text_weight:        weight of the text around the needles. The lines of the needles and the queries are
                        random and have 0.
    is_domain_balanced: whether every domain is drawn equally often; if false, text is drawn in proportion to
                        its length.
    num_validation_batches: batches of the validation loss.

    Raises ValueError where settings contradict each other or are out of range, and where no document is long
    enough for a needle context.
    """

    def __init__(
        self,
        *,
        corpus: Corpus,
        num_steps: int,
        batch_tokens: int,
        curriculum: Sequence[Mapping[str, Any]],
        needle_fraction: float = 0.5,
        num_needles: int = 4,
        num_queries: int = 4,
        min_needles: int | None = None,
        min_queries: int | None = None,
        max_trailing_tokens: int = 0,
        answer_weight: float = 8.0,
        text_weight: float = 1.0,
        is_domain_balanced: bool = True,
        num_validation_batches: int = 4,
        seed: int = 0,
    ) -> None:
        for name, value in (
            ("num_steps", num_steps),
            ("batch_tokens", batch_tokens),
            ("num_validation_batches", num_validation_batches),
        ):
            if value < 1:
                raise ValueError(f"{name}={value} must be positive.")
        if seed < 0:
            raise ValueError(f"seed={seed} must not be negative.")
        if answer_weight < 0 or text_weight < 0:
            raise ValueError(
                f"answer_weight={answer_weight} and text_weight={text_weight} must not be negative."
            )
        self.corpus, self.num_steps, self.batch_tokens, self.seed = corpus, num_steps, batch_tokens, seed
        self.num_validation_batches = num_validation_batches
        self.answer_weight, self.text_weight = answer_weight, text_weight
        self.stages = _stages(
            curriculum,
            needle_fraction=needle_fraction,
            num_needles=num_needles,
            min_needles=min_needles,
            num_queries=num_queries,
            min_queries=min_queries,
        )
        self._documents = DocumentSampler(corpus.train, is_domain_balanced=is_domain_balanced)
        self._validation_documents = DocumentSampler(corpus.validation, is_domain_balanced=is_domain_balanced)
        self._max_trailing_tokens = max_trailing_tokens
        self._makers = {stage: self._maker(stage, corpus.train) for stage in self.stages}
        for stage, maker in self._makers.items():
            if stage.needle_fraction:
                maker.check(stage.sequence_tokens + 1)

    def _maker(self, stage: Stage, split: Split) -> NeedleMaker:
        return NeedleMaker(
            split=split,
            num_needles=stage.num_needles,
            min_needles=stage.min_needles,
            num_queries=stage.num_queries,
            min_queries=stage.min_queries,
            max_trailing_tokens=self._max_trailing_tokens,
        )

    @property
    def trained_lengths_tokens(self) -> tuple[int, ...]:
        """Return the sequence lengths of the curriculum, in rising order."""
        return tuple(sorted({stage.sequence_tokens for stage in self.stages}))

    def stage_at(self, step: int) -> Stage:
        """Return the stage of a step."""
        for stage in self.stages:
            if step < stage.until_fraction * self.num_steps:
                return stage
        return self.stages[-1]

    def batch(self, step: int) -> Batch:
        """Return the batch of a step. Its first rows are needle contexts."""
        stage = self.stage_at(step)
        sequence_tokens = stage.sequence_tokens
        num_rows = max(1, self.batch_tokens // sequence_tokens)
        rng = np.random.default_rng((self.seed, TRAINING, step))
        # Where the share of needle rows is not a whole number of rows, it holds on average.
        num_needle_rows = int(stage.needle_fraction * num_rows + rng.random())
        ids = np.empty((num_rows, sequence_tokens + 1), dtype=np.int64)
        weights = np.ones((num_rows, sequence_tokens), dtype=np.float32)
        self._fill(
            ids, weights, num_needle_rows, self.corpus.train, self._documents, self._makers[stage], rng
        )
        return _batch(ids, weights)

    def validation_batches(self) -> Iterator[Batch]:
        """Yield windows of validation text at the longest trained length, without needles.

        They are the same every time and for every seed."""
        return self._validation_mixture(0.0)

    def mixture_batches(self) -> Iterator[Batch]:
        """Yield validation batches like those of the last stage, text and needles, at the longest length.

        The search of the learning rate decides by their loss. They are the same every time and for every
        seed. Raises ValueError where no validation document is long enough for a needle context."""
        return self._validation_mixture(self.stages[-1].needle_fraction)

    def _validation_mixture(self, needle_fraction: float) -> Iterator[Batch]:
        if needle_fraction:
            maker = self._maker(self.stages[-1], self.corpus.validation)
            maker.check(self.trained_lengths_tokens[-1] + 1)
        else:
            maker = self._makers[self.stages[-1]]  # draws nothing
        sequence_tokens = self.trained_lengths_tokens[-1]
        num_rows = max(1, self.batch_tokens // sequence_tokens)
        for index in range(self.num_validation_batches):
            rng = np.random.default_rng((0, VALIDATION, index))
            ids = np.empty((num_rows, sequence_tokens + 1), dtype=np.int64)
            weights = np.ones((num_rows, sequence_tokens), dtype=np.float32)
            # Where the share is not a whole number of rows, it holds over all batches.
            done, total = (math.floor(needle_fraction * num_rows * count) for count in (index, index + 1))
            self._fill(
                ids,
                weights,
                total - done,
                self.corpus.validation,
                self._validation_documents,
                maker,
                rng,
            )
            yield _batch(ids, weights)

    def _fill(
        self,
        ids: np.ndarray,
        weights: np.ndarray,
        num_needle_rows: int,
        split: Split,
        documents: DocumentSampler,
        needles: NeedleMaker,
        rng: np.random.Generator,
    ) -> None:
        """Fill the first rows with needle contexts, and the others with windows of text."""
        for row in range(len(ids)):
            if row < num_needle_rows:
                self._fill_needles(ids[row], weights[row], needles, rng)
            else:
                fill_with_text(ids[row], weights[row], split, documents, rng)

    def _fill_needles(
        self, ids: np.ndarray, weights: np.ndarray, maker: NeedleMaker, rng: np.random.Generator
    ) -> None:
        needles = maker.draw(len(ids), rng)
        ids[:] = needles.tokens
        weights[:] = self.text_weight
        # weights[i] belongs to the target ids[i + 1].
        for start, stop in [*needles.needle_spans, *needles.query_spans]:
            weights[max(start - 1, 0) : stop - 1] = 0.0
        for start, stop in needles.answer_spans:
            weights[start - 1 : stop - 1] = self.answer_weight
            weights[stop - 1 : stop] = 0.0  # the line feed after an answer that is not the last


def fill_with_text(
    ids: np.ndarray, weights: np.ndarray, split: Split, documents: DocumentSampler, rng: np.random.Generator
) -> None:
    """Fill ids (T + 1,) with a window of one document, and with further documents where it is shorter.

    weights (T,) become 0 where the target is the first token of another document."""
    filled = 0
    while filled < len(ids):
        document = split.document(documents.draw(rng))
        room = len(ids) - filled
        # The first document of a row starts anywhere, the following ones at their beginning.
        num_starts = max(1, len(document) - room + 1) if filled == 0 else 1
        start = int(rng.integers(num_starts))
        window = document[start : start + room]
        ids[filled : filled + len(window)] = window
        if filled:
            weights[filled - 1] = 0.0
        filled += len(window)


def _batch(ids: np.ndarray, weights: np.ndarray) -> Batch:
    return Batch(
        torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(ids[:, 1:].copy()), torch.from_numpy(weights)
    )


def _stages(curriculum: Sequence[Mapping[str, Any]], **general: Any) -> tuple[Stage, ...]:
    """Return the checked stages. A stage without a setting of its own has the general one."""
    required = ["until_fraction", "sequence_tokens"]
    stages = []
    for entry in curriculum:
        settings = {key: value for key, value in entry.items() if value is not None}
        if not set(required) <= set(settings) <= {*required, *general}:
            raise ValueError(
                f"curriculum: a stage has the keys {', '.join(required)} and perhaps {', '.join(general)}, "
                f"not {list(entry)}."
            )
        stage = Stage(**{**general, **settings})
        if stage.sequence_tokens < 1:
            raise ValueError(f"curriculum: sequence_tokens={stage.sequence_tokens} must be positive.")
        if not 0.0 <= stage.needle_fraction <= 1.0:
            raise ValueError(f"needle_fraction={stage.needle_fraction} must lie between 0 and 1.")
        stages.append(stage)
    if not stages:
        raise ValueError("curriculum=[] needs at least one stage.")
    fractions = [stage.until_fraction for stage in stages]
    if fractions != sorted(set(fractions)) or fractions[0] <= 0 or fractions[-1] != 1.0:
        raise ValueError(f"curriculum: until_fraction={fractions} must rise from above 0 to 1.")
    return tuple(stages)
