"""Make prompts and right answers of one domain, for training that rewards exact answers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tasks.data.corpus import Split
from tasks.data.sampling import DocumentSampler
from tasks.examples.needle import NeedleMaker

#: The domain of needle contexts, whose answers are their numbers, and the domain of all text. Any other name
#: is a domain of the documents.
NEEDLE_DOMAIN, ANY_DOMAIN = "needle", "any"

#: Part of each random seed, so that a step has other keys and numbers in each split. 0 and 1 belong to
#: tasks.examples.training_mixture. The code stands before the step, because trailing zeros do not change a
#: seed.
SPLIT_CODES = {"train": 2, "validation": 3, "test": 4}


class ExpertExamples:
    """Function from a step to prompts (B, prompt_tokens) and answers (B, A), int64 on the CPU.

    A step always has the same examples. In the domain "needle", the answer is the number that the prompt asks
    for, and A follows from the format. In other domains, it is the next num_answer_tokens tokens of a
    document of the domain. Raises ValueError where a number is not positive, or the domain has no document
    that is long enough.
    """

    def __init__(
        self,
        *,
        split: Split,
        domain: str,
        batch_size: int,
        prompt_tokens: int,
        num_answer_tokens: int = 3,
        num_needles: int = 4,
        seed: int = 0,
    ) -> None:
        for name, value in (
            ("batch_size", batch_size),
            ("prompt_tokens", prompt_tokens),
            ("num_answer_tokens", num_answer_tokens),
        ):
            if value < 1:
                raise ValueError(f"{name}={value} must be positive.")
        self.batch_size, self.prompt_tokens, self.seed = batch_size, prompt_tokens, seed
        self._split, self._needles, self._documents = split, None, None
        if domain == NEEDLE_DOMAIN:
            self._needles = NeedleMaker(split=split, num_needles=num_needles)
            self.num_answer_tokens = self._needles.answer_tokens
            self._needles.check(prompt_tokens + self.num_answer_tokens)
        else:
            self.num_answer_tokens = num_answer_tokens
            length = prompt_tokens + num_answer_tokens
            self._documents = DocumentSampler(
                split, min_tokens=length, domain=None if domain == ANY_DOMAIN else domain
            )

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((self.seed, SPLIT_CODES[self._split.name], step))
        rows = np.stack([self._row(rng) for _ in range(self.batch_size)]).astype(np.int64)
        tokens = torch.from_numpy(rows)
        return tokens[:, : self.prompt_tokens], tokens[:, self.prompt_tokens :]

    def _row(self, rng: np.random.Generator) -> np.ndarray:
        length = self.prompt_tokens + self.num_answer_tokens
        if self._needles is not None:
            return self._needles.draw(length, rng).tokens
        assert self._documents is not None
        document = self._split.document(self._documents.draw(rng))
        start = int(rng.integers(len(document) - length + 1))
        return np.asarray(document[start : start + length])
