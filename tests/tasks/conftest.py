"""A small corpus of the project's own, and models whose answers are known."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs.base import Flops, Phase, SequenceModel
from tasks.base import TaskInputs
from tasks.data.corpus import Corpus, load_corpus
from tasks.data.sources import TextFolder

TEXT = Path(__file__).resolve().parent.parent / "corpus"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """tests/corpus as bytes."""
    return load_corpus(source=TextFolder(str(TEXT)), cache_dir=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def inputs(corpus: Corpus) -> TaskInputs:
    """What a task is given; trained up to 256 tokens."""
    return TaskInputs(
        corpus=corpus,
        tokenizer=corpus.tokenizer,
        device=torch.device("cpu"),
        seed=0,
        trained_lengths_tokens=(128, 256),
    )


class SeenState(NamedTuple):
    """tokens (B, T) seen so far; choice is what dispatch or select_domain said."""

    tokens: Tensor
    num_tokens: int
    choice: str = ""


class ReaderModel(SequenceModel):
    """A model that is a plain function of the tokens seen so far, for tests of the tasks."""

    vocab_size = 257

    def __init__(self, *, is_adaptive: bool = False) -> None:
        super().__init__()
        self.is_adaptive = is_adaptive
        self.scale = nn.Parameter(torch.ones(()))
        self.choices: list[str] = []
        self.largest_chunk_tokens = 0

    def logits_after(self, seen: list[int]) -> Tensor:
        """Logits (V,) of the token after `seen`; here none is preferred."""
        del seen
        return torch.zeros(self.vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.prefill(tokens, self.init_state(*tokens.shape), tokens.shape[1])[0]

    def loss(self, tokens: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())

    def init_state(self, batch_size: int, max_context_tokens: int) -> SeenState:
        return SeenState(torch.zeros((batch_size, 0), dtype=torch.long), 0)

    def prefill(self, tokens: Tensor, state: SeenState, num_logits: int = 1) -> tuple[Tensor, SeenState]:
        self.largest_chunk_tokens = max(self.largest_chunk_tokens, tokens.shape[1])
        if self.is_adaptive:
            self.choices.append(state.choice)
        seen = torch.cat([state.tokens, tokens], dim=1)
        first = seen.shape[1] - num_logits
        rows = [[self.logits_after(row[: i + 1]) for i in range(first, len(row))] for row in seen.tolist()]
        logits = torch.stack([torch.stack(row) for row in rows]) if num_logits else seen.new_zeros(0)
        return logits, state._replace(tokens=seen, num_tokens=seen.shape[1])

    def decode(self, token: Tensor, state: SeenState) -> tuple[Tensor, SeenState]:
        logits, state = self.prefill(token[:, None], state)
        return logits[:, 0], state

    def dispatch(self, prompt: Tensor, state: SeenState) -> SeenState:
        assert state.num_tokens == 0
        return state._replace(choice=f"dispatched on {prompt.shape[1]}")

    def select_domain(self, domain: str, state: SeenState) -> SeenState:
        assert state.num_tokens == 0
        return state._replace(choice=domain)

    def state_bytes_at(self, batch_size: int, context_tokens: int) -> int:
        return 0

    def flops(self, context_tokens: int, phase: Phase) -> Flops:
        return Flops()


class CopyModel(ReaderModel):
    """Knows the needle format: gives the number that stands beside the key it is asked for."""

    certainty = 20.0

    def logits_after(self, seen: list[int]) -> Tensor:
        logits = torch.zeros(self.vocab_size)
        text = bytes(token for token in seen if token < 256)
        asked = re.search(rb"#([a-z]=)(\d{0,3})$", text)
        if asked:
            found = re.search(b"#" + re.escape(asked[1]) + rb"(\d{4})\n", text)
            assert found is not None
            logits[found[1][len(asked[2])]] = self.certainty
        return logits
