"""Keep tokenised documents on disk, as memory-mapped arrays in a folder named by their content.

A folder is written under a temporary name and renamed when it is complete, so that jobs can build the same
corpus at the same time. A folder whose files were damaged later is noticed and built again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tasks.data.sources import Document, Source
from tasks.data.tokenizers import Tokenizer

#: To be raised when the layout of the files changes, so that old caches are not read.
FORMAT_VERSION = 1


@dataclass(frozen=True)
class TokenCache:
    """Tokenised documents.

    tokens:       tokens of all documents, end to end, memory-mapped.
    offsets:      (N + 1,); document i is tokens[offsets[i]:offsets[i + 1]].
    byte_lengths: bytes of each token, memory-mapped; None for byte tokens.
    """

    content_hash: str
    num_skipped: int
    names: list[str]
    domains: list[str]
    tokens: np.ndarray
    offsets: np.ndarray
    byte_lengths: np.ndarray | None


class DamagedCache(Exception):
    """The files of a cache folder have changed since they were written."""


def default_cache_dir() -> Path:
    """Return $LONGARCH_CACHE, or ~/.cache/longarch where it is not set."""
    return Path(os.environ.get("LONGARCH_CACHE") or "~/.cache/longarch").expanduser()


def open_or_build(source: Source, tokenizer: Tokenizer, cache_dir: Path | None) -> TokenCache:
    """Return the tokenised `source`, from the cache where it is there and undamaged.

    Raises ValueError where the folder cannot be used, and the errors of `source`."""
    root = default_cache_dir() if cache_dir is None else cache_dir.expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
        content_hash = _known_hash(source, tokenizer, root)
        if content_hash is not None and (root / content_hash).is_dir():  # a folder appears complete
            try:
                return _open(root / content_hash)
            except (DamagedCache, OSError, ValueError, KeyError, TypeError):
                shutil.rmtree(root / content_hash, ignore_errors=True)
        return _open(_build(source, tokenizer, root))
    except OSError as error:
        raise ValueError(
            f"The cache folder {root} cannot be used ({error.strerror or error}); "
            "set LONGARCH_CACHE to a folder that can be written."
        ) from error


class _ContentHash:
    """Running SHA-256 over names, domains, contents and the tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._hash = hashlib.sha256(f"{FORMAT_VERSION}/{tokenizer.name}".encode())

    def add(self, document: Document) -> None:
        for part in (document.name.encode(), document.domain.encode(), document.text):
            self._hash.update(len(part).to_bytes(8, "big") + part)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()[:24]


def _pointer(source: Source, tokenizer: Tokenizer, root: Path) -> Path | None:
    """Return the file that holds the content hash of a source that is too slow to read again, else None."""
    settings = source.settings_key()
    if settings is None:
        return None
    text = json.dumps([FORMAT_VERSION, source.name, settings, tokenizer.name], sort_keys=True)
    return root / f"source-{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def _known_hash(source: Source, tokenizer: Tokenizer, root: Path) -> str | None:
    pointer = _pointer(source, tokenizer, root)
    if pointer is not None:
        try:
            return str(json.loads(pointer.read_text())["content_hash"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
    content = _ContentHash(tokenizer)
    for document in source.documents():
        if document.text:
            content.add(document)
    return content.hexdigest()


def _build(source: Source, tokenizer: Tokenizer, root: Path) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="building-", dir=root))
    try:
        content_hash = _write(source, tokenizer, folder)
        target = root / content_hash
        try:
            os.rename(folder, target)
        except OSError:  # another job was first and wrote the same
            if not target.is_dir():
                raise
        pointer = _pointer(source, tokenizer, root)
        if pointer is not None:
            _write_json(folder.with_suffix(".json"), {"content_hash": content_hash})
            os.replace(folder.with_suffix(".json"), pointer)
        return target
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(source: Source, tokenizer: Tokenizer, folder: Path) -> str:
    content, names, domains, offsets = _ContentHash(tokenizer), [], [], [0]
    is_byte_level = True
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "byte_lengths.bin").open("wb") as lengths:
        for document in source.documents():
            if not document.text:
                continue
            content.add(document)
            encoding = tokenizer.encode(document.text)
            start = np.array([tokenizer.document_start_id])
            num_tokens = _append(tokens, np.concatenate([start, encoding.tokens]), tokenizer.token_dtype)
            if encoding.byte_lengths is not None:
                is_byte_level = False
                _append(lengths, np.concatenate([[0], encoding.byte_lengths]), np.dtype(np.uint32))
            names.append(document.name)
            domains.append(document.domain)
            offsets.append(offsets[-1] + num_tokens)
    if not names:
        raise ValueError(f"The data source {source.name} holds no text: every document is empty.")
    if is_byte_level:
        (folder / "byte_lengths.bin").unlink()
    np.array(offsets, dtype=np.int64).tofile(folder / "offsets.bin")
    meta = {
        "content_hash": content.hexdigest(),
        "num_skipped": len(source.skipped),
        "token_dtype": tokenizer.token_dtype.name,
        "names": names,
        "domains": domains,
        "checksums": {path.name: _checksum(path) for path in sorted(folder.glob("*.bin"))},
    }
    _write_json(folder / "meta.json", meta)
    return content.hexdigest()


def _append(file: BinaryIO, values: np.ndarray, dtype: np.dtype) -> int:
    file.write(values.astype(dtype).tobytes())
    return len(values)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _open(folder: Path) -> TokenCache:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    for name, checksum in meta["checksums"].items():
        if _checksum(folder / name) != checksum:
            raise DamagedCache(f"{folder / name} is not what was written")
    lengths = folder / "byte_lengths.bin"
    return TokenCache(
        content_hash=meta["content_hash"],
        num_skipped=meta["num_skipped"],
        names=meta["names"],
        domains=meta["domains"],
        tokens=np.memmap(folder / "tokens.bin", dtype=meta["token_dtype"], mode="r"),
        offsets=np.fromfile(folder / "offsets.bin", dtype=np.int64),
        byte_lengths=np.memmap(lengths, dtype=np.uint32, mode="r") if lengths.exists() else None,
    )
