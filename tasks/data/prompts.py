"""Prompts with one right answer, a domain at a time: what Transformer²'s experts learn from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tasks.data.corpus import Corpus
from tasks.data.needles import NeedleMaker
from tasks.data.sampling import DocumentSampler

#: The domain of the needle task; every other domain is one of the corpus's.
NEEDLE_DOMAIN = "needle"


class DomainPrompts:
    """A function of the step: prompts (B, P) and the tokens that follow, (B, A), from `split`.

    For the needle domain the prompt is a needle context and the answer its number; for a domain of
    the corpus the prompt is a window of a document and the answer its next `answer_tokens` tokens.
    Raises ValueError where the corpus has no such domain or no document is long enough.
    """

    def __init__(
        self,
        *,
        corpus: Corpus,
        split: str,
        domain: str,
        prompt_tokens: int,
        answer_tokens: int,
        batch_size: int,
        num_needles: int,
        seed: int,
        device: str | torch.device = "cpu",
    ) -> None:
        for name, value in (
            ("prompt_tokens", prompt_tokens),
            ("answer_tokens", answer_tokens),
            ("batch_size", batch_size),
        ):
            if value < 1:
                raise ValueError(f"{name}={value} must be positive.")
        self.documents = getattr(corpus, split)
        self.prompt_tokens, self.batch_size = prompt_tokens, batch_size
        self.seed, self.split, self.device = seed, split, device
        self.needles = self.sampler = None
        if domain == NEEDLE_DOMAIN:
            self.needles = NeedleMaker(split=self.documents, num_needles=num_needles)
            self.answer_tokens = self.needles.answer_tokens
            self.needles.check(prompt_tokens + self.answer_tokens)
        else:
            if domain not in self.documents.domains:
                valid = ", ".join(sorted({*self.documents.domains, NEEDLE_DOMAIN}))
                raise ValueError(f"The corpus has no domain {domain!r}; it has {valid}.")
            self.answer_tokens = answer_tokens
            self.sampler = DocumentSampler(
                self.documents, min_tokens=prompt_tokens + answer_tokens, domain=domain
            )

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step, the same whenever it is asked for."""
        rng = np.random.default_rng((self.seed, ("train", "validation", "test").index(self.split), step))
        length = self.prompt_tokens + self.answer_tokens
        rows = np.stack([self._row(length, rng) for _ in range(self.batch_size)]).astype(np.int64)
        tokens = torch.from_numpy(rows).to(self.device)
        return tokens[:, : self.prompt_tokens], tokens[:, self.prompt_tokens :]

    def _row(self, length: int, rng: np.random.Generator) -> np.ndarray:
        if self.needles is not None:
            return self.needles.draw(length, rng).tokens
        assert self.sampler is not None
        document = self.documents.document(self.sampler.draw(rng))
        start = int(rng.integers(len(document) - length + 1))
        return document[start : start + length]
