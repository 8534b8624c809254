"""Load a tokenised corpus: memory-mapped documents, split into training, validation and test."""

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

#: Shares of the documents, by a hash of their names. Training has the rest.
TEST_FRACTION, VALIDATION_FRACTION = 0.05, 0.05


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split of a corpus. Every document begins with the document-start token.

    tokens, byte_lengths: of the whole corpus, shared by its splits. byte_lengths is None where every token
                          but the document start is one byte.
    starts, stops:        (N,); document i is tokens[starts[i]:stops[i]].
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
        """Return the number of documents."""
        return len(self.names)

    @cached_property
    def lengths_tokens(self) -> np.ndarray:
        """Return the number of tokens of each document (N,), including the document start."""
        return self.stops - self.starts

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens of all documents."""
        return int(self.lengths_tokens.sum())

    def document(self, index: int) -> np.ndarray:
        """Return the tokens of one document (T,), a read-only view of the memory map."""
        return self.tokens[self.starts[index] : self.stops[index]]

    def num_bytes(self, index: int, start: int = 0, stop: int | None = None) -> int:
        """Return the number of bytes of text that tokens [start, stop) of a document stand for."""
        first, last = int(self.starts[index]), int(self.stops[index])
        stop = last - first if stop is None else min(stop, last - first)
        if self.byte_lengths is None:
            return stop - max(start, 1) if stop > start else 0
        return int(self.byte_lengths[first + start : first + stop].sum(dtype=np.int64))

    @cached_property
    def bytes_per_token(self) -> float:
        """Return the mean bytes per token, by which a loss per token is divided to get one per byte."""
        return sum(self.num_bytes(i) for i in range(self.num_documents)) / (
            self.num_tokens - self.num_documents
        )

    @property
    def longest(self) -> tuple[str, int]:
        """Return the name and the number of tokens of the longest document."""
        index = int(np.argmax(self.lengths_tokens))
        return self.names[index], int(self.lengths_tokens[index])


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The splits of one source.

    content_hash: hash of names, domains, contents and tokenizer; equal hashes mean equal tokens.
    num_skipped:  number of unreadable files that were left out.
    """

    name: str
    tokenizer: Tokenizer
    content_hash: str
    num_skipped: int
    train: Split
    validation: Split
    test: Split

    def description(self) -> dict[str, Any]:
        """Return what a record says about the data, as JSON values."""
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
    """Tokenise `source`, or find it in the cache, and split it. Documents without text are left out.

    tokenizer:  as in `make_tokenizer`.
    vocab_size: size of the vocabulary that the models are built for; it must be large enough.
    cache_dir:  default $LONGARCH_CACHE, else ~/.cache/longarch.
    Raises ValueError with one sentence where the source, the tokenizer or the folder cannot be used.
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
    """Return the split of each document, which the SHA-256 of its name decides.

    A document stays in its split when others come or go. There is one exception: where a split would be
    empty, as among two dozen books, the documents are ranked by their hashes, and the first go to test and
    validation.

    domains: the domain of each document, if every domain is to be split on its own.
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
    """Split one group of documents; see `split_documents`. The sentence of an error names `domain`."""
    if len(names) < 3:
        what = "The data has" if domain is None else f"The data's domain {domain!r} has"
        raise ValueError(
            f"{what} {len(names)} document(s) with text; training, validation and test need at "
            "least 3, one document per file."
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
