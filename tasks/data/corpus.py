"""A tokenised corpus: documents on disk, memory-mapped, split into train, validation and test."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tasks.data.cache import TokenCache, open_or_build
from tasks.data.sources import Source
from tasks.data.tokenizers import Tokenizer, make_tokenizer

#: Shares of the documents, by a hash of their name; training has the rest.
TEST_FRACTION, VALIDATION_FRACTION = 0.05, 0.05


@dataclass(frozen=True, kw_only=True)
class Split:
    """Some of a corpus' documents. Every document begins with the document-start token.

    tokens and byte_lengths are shared by the splits; document i is tokens[starts[i]:stops[i]].
    byte_lengths is None where every token but the document start is one byte.
    """

    name: str
    tokenizer: Tokenizer
    tokens: np.ndarray
    byte_lengths: np.ndarray | None
    starts: np.ndarray
    stops: np.ndarray
    names: tuple[str, ...]
    domains: tuple[str, ...]

    @property
    def num_documents(self) -> int:
        """Documents."""
        return len(self.names)

    @cached_property
    def lengths_tokens(self) -> np.ndarray:
        """Tokens of each document, the document start included (N,)."""
        return self.stops - self.starts

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.lengths_tokens.sum())

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document (T,), a read-only view of the memory map."""
        return self.tokens[self.starts[index] : self.stops[index]]

    def num_bytes(self, index: int, start: int = 0, stop: int | None = None) -> int:
        """Bytes of text that tokens [start, stop) of a document stand for."""
        first, last = int(self.starts[index]), int(self.stops[index])
        stop = last - first if stop is None else min(stop, last - first)
        if self.byte_lengths is None:
            return stop - max(start, 1) if stop > start else 0
        return int(self.byte_lengths[first + start : first + stop].sum(dtype=np.int64))

    @cached_property
    def bytes_per_token(self) -> float:
        """Mean over the split; what turns a loss a token into one a byte."""
        return sum(self.num_bytes(i) for i in range(self.num_documents)) / (
            self.num_tokens - self.num_documents
        )

    @property
    def longest(self) -> tuple[str, int]:
        """Name and tokens of the longest document."""
        index = int(np.argmax(self.lengths_tokens))
        return self.names[index], int(self.lengths_tokens[index])


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """content_hash covers names, contents and tokenizer: equal hashes mean equal tokens."""

    name: str
    tokenizer: Tokenizer
    content_hash: str
    num_skipped: int
    train: Split
    validation: Split
    test: Split

    def description(self) -> dict[str, Any]:
        """What a record says of the data, as JSON values."""
        splits = (self.train, self.validation, self.test)
        return {
            "name": self.name,
            "tokenizer": self.tokenizer.name,
            "vocab_size": self.tokenizer.vocab_size,
            "content_hash": self.content_hash,
            "num_skipped_files": self.num_skipped,
            "num_documents": {split.name: split.num_documents for split in splits},
            "num_tokens": {split.name: split.num_tokens for split in splits},
        }


def load_corpus(
    *,
    source: Source,
    tokenizer: str | Tokenizer = "byte",
    vocab_size: int | None = None,
    cache_dir: str | None = None,
) -> Corpus:
    """Tokenises `source`, or finds it in the cache, and splits it.

    tokenizer: as `make_tokenizer`. vocab_size: what the models are built for; checked.
    cache_dir: default $LONGARCH_CACHE, else ~/.cache/longarch. Documents without text are left out.
    Raises ValueError with one sentence where the source, the tokenizer or the folder cannot serve.
    """
    tokenizer = make_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    if vocab_size is not None and vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"data.vocab_size={vocab_size} is smaller than the tokenizer's vocabulary; "
            f"set data.vocab_size={tokenizer.vocab_size}."
        )
    cache = open_or_build(source, tokenizer, None if cache_dir is None else Path(cache_dir))
    if cache.num_skipped:
        print(f"{source.name}: {cache.num_skipped} unreadable files left out.", file=sys.stderr, flush=True)
    membership = split_documents(cache.names, cache.domains if source.is_split_by_domain else None)
    splits = {name: _split(name, membership, cache, tokenizer) for name in ("train", "validation", "test")}
    return Corpus(
        name=source.name,
        tokenizer=tokenizer,
        content_hash=cache.content_hash,
        num_skipped=cache.num_skipped,
        **splits,
    )


def split_documents(names: list[str], domains: list[str] | None = None) -> list[str]:
    """The split of each document, by the SHA-256 of its name: it does not move when other documents
    come or go. Only where that leaves a split empty, as among two dozen books, are the documents
    ranked by their hash and the first of them given to test and validation. domains: of each document,
    where every domain is to be split so on its own.

    Raises ValueError for fewer than three documents."""
    if domains is not None:
        splits = [""] * len(names)
        for domain in dict.fromkeys(domains):
            indices = [i for i, name in enumerate(domains) if name == domain]
            for index, split in zip(indices, _split_names([names[i] for i in indices], domain), strict=True):
                splits[index] = split
        return splits
    return _split_names(names)


def _split_names(names: list[str], domain: str | None = None) -> list[str]:
    """`split_documents` of one group; `domain` is for the error's sentence."""
    if len(names) < 3:
        what = "The data has" if domain is None else f"The data's domain {domain!r} has"
        raise ValueError(
            f"{what} {len(names)} document(s) with text; training, validation and test need at "
            "least 3, one document a file."
        )
    places = [int.from_bytes(hashlib.sha256(n.encode()).digest()[:8], "big") / 2**64 for n in names]
    held_out = TEST_FRACTION + VALIDATION_FRACTION
    splits = ["test" if p < TEST_FRACTION else "validation" if p < held_out else "train" for p in places]
    if len(set(splits)) == 3:
        return splits
    num_test = max(1, round(TEST_FRACTION * len(names)))
    num_validation = max(1, round(VALIDATION_FRACTION * len(names)))
    splits = ["train"] * len(names)
    for rank, index in enumerate(sorted(range(len(names)), key=places.__getitem__)):
        if rank < num_test + num_validation:
            splits[index] = "test" if rank < num_test else "validation"
    return splits


def _split(name: str, membership: list[str], cache: TokenCache, tokenizer: Tokenizer) -> Split:
    indices = [i for i, split in enumerate(membership) if split == name]
    return Split(
        name=name,
        tokenizer=tokenizer,
        tokens=cache.tokens,
        byte_lengths=cache.byte_lengths,
        starts=cache.offsets[:-1][indices],
        stops=cache.offsets[1:][indices],
        names=tuple(cache.names[i] for i in indices),
        domains=tuple(cache.domains[i] for i in indices),
    )
