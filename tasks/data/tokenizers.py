"""Turn text into token ids and back, by bytes or by a tokenizer of the Hugging Face hub."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

#: Names that public tokenizers give to the token that starts a document.
DOCUMENT_START_TOKENS = ("<s>", "<bos>", "<|begin_of_text|>", "<|endoftext|>", "[CLS]", "</s>")


class Encoding(NamedTuple):
    """An encoded text.

    tokens:       ids (T,).
    byte_lengths: number of UTF-8 bytes that each token adds (T,), whose sum is that of the text; None where
                  every token is one byte.
    """

    tokens: np.ndarray
    byte_lengths: np.ndarray | None


class Tokenizer(ABC):
    """A mapping between UTF-8 text and token ids.

    name: identifies the vocabulary and the rules; equal names give equal tokens. Tokenizers with equal names
          and equal document starts are equal.
    """

    name: str
    vocab_size: int
    document_start_id: int

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[str, int]:
        return self.name, self.document_start_id

    @abstractmethod
    def encode(self, text: bytes) -> Encoding:
        """Return the ids of UTF-8 text, without the document start."""

    @abstractmethod
    def decode(self, tokens: np.ndarray) -> bytes:
        """Return the UTF-8 text of ids (T,). Document starts are left out."""

    @property
    @abstractmethod
    def is_line_end(self) -> np.ndarray:
        """Return for each id (V,) whether its text ends with a line feed."""

    @property
    def token_dtype(self) -> np.dtype:
        """Return uint16 where it holds every id, else uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)


class ByteTokenizer(Tokenizer):
    """One token per byte, and id 256 for the start of a document."""

    name = "byte"
    vocab_size = 257
    document_start_id = 256

    def encode(self, text: bytes) -> Encoding:
        return Encoding(np.frombuffer(text, dtype=np.uint8).astype(np.uint16), None)

    def decode(self, tokens: np.ndarray) -> bytes:
        tokens = np.asarray(tokens)
        return tokens[tokens < 256].astype(np.uint8).tobytes()

    @cached_property
    def is_line_end(self) -> np.ndarray:
        return np.arange(self.vocab_size) == ord("\n")


class HubTokenizer(Tokenizer):
    """The tokenizer of a tokenizer.json, from a file, or from the hub by the name of its repository.

    document_start: token that starts a document. By default, it is the first of DOCUMENT_START_TOKENS that
                    the vocabulary has, or a new id where it has none.
    Raises ValueError where the package `tokenizers` is missing, the tokenizer cannot be read, or
    document_start is not in its vocabulary.
    """

    def __init__(self, path_or_name: str, document_start: str | None = None) -> None:
        self._tokenizer = _load(path_or_name)
        digest = hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()[:16]
        self.name = f"hub:{digest}"
        candidates = DOCUMENT_START_TOKENS if document_start is None else (document_start,)
        ids = [self._tokenizer.token_to_id(token) for token in candidates]
        known = [i for i in ids if i is not None]
        if document_start is not None and not known:
            raise ValueError(f"document_start={document_start!r} is not a token of {path_or_name}.")
        largest = max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.document_start_id = known[0] if known else largest + 1
        self.vocab_size = max(largest, self.document_start_id) + 1

    def encode(self, text: bytes) -> Encoding:
        string = text.decode("utf-8", errors="replace")
        encoding = self._tokenizer.encode(string, add_special_tokens=False)
        tokens = np.array(encoding.ids, dtype=self.token_dtype)
        # Offsets count characters. A token gets all bytes up to its end that no earlier token got, so that
        # white space that a tokenizer drops counts for the next token, and at the very end for the last.
        widths = np.array([len(character.encode()) for character in string], dtype=np.int64)
        bytes_before = np.concatenate([[0], np.cumsum(widths)])
        char_ends = np.array([end for _, end in encoding.offsets], dtype=np.int64)
        byte_ends = np.maximum.accumulate(bytes_before[char_ends]) if len(tokens) else char_ends
        if len(tokens):
            byte_ends[-1] = bytes_before[-1]
        return Encoding(tokens, np.diff(byte_ends, prepend=0).astype(np.uint32))

    def decode(self, tokens: np.ndarray) -> bytes:
        ids = [int(i) for i in np.asarray(tokens) if int(i) != self.document_start_id]
        return self._tokenizer.decode(ids, skip_special_tokens=False).encode()

    @cached_property
    def is_line_end(self) -> np.ndarray:
        texts = self._tokenizer.decode_batch([[i] for i in range(self.vocab_size)])
        return np.array([text.endswith("\n") for text in texts])


def make_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer "byte", or that of a tokenizer.json, by its path or its repository on the hub."""
    return ByteTokenizer() if name == "byte" else HubTokenizer(name)


def _load(path_or_name: str) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(
            f"The tokenizer {path_or_name!r} needs the package tokenizers, which is not installed; "
            "run pip install 'longarch[huggingface]', or choose data.tokenizer=byte."
        ) from error
    path = Path(path_or_name).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        if path.is_file():
            return tokenizers.Tokenizer.from_file(str(path))
        return tokenizers.Tokenizer.from_pretrained(path_or_name)
    except Exception as error:  # the package raises bare Exception for every failure
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"The tokenizer {path_or_name!r} is neither a readable tokenizer.json nor on the hub: {reason}."
        ) from error
