"""Read documents of a data set on the Hugging Face hub, or of local files that `datasets` reads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from tasks.data.sources import Document, Source


class HuggingFace(Source):
    """A source that reads through the package `datasets` (extra `huggingface`).

    path, name, split, revision, data_files: as in datasets.load_dataset.
    streaming:     whether to read row by row instead of downloading the whole set first.
    text_field:    column that holds the text. Rows whose text is null are skipped.
    domain_field:  column (dotted where nested) that holds the domain; by default, there is one domain.
    max_documents: number of documents after which reading stops; null reads all.
    document_start_pattern: for sets whose rows are paragraphs (WikiText), a regular expression that the first
                   row of a document matches. The rows up to the next match are joined. By default, a row is a
                   document.

    In the cache, a set on the hub is known by these settings and not by its content: give a `revision` to pin
    it. Local files are read again each time. Raises ValueError where the package is missing, or the data set,
    the split or the column cannot be read.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        split: str = "train",
        text_field: str = "text",
        streaming: bool = True,
        max_documents: int | None = None,
        domain_field: str | None = None,
        document_start_pattern: str | None = None,
        revision: str | None = None,
        data_files: str | list[str] | None = None,
    ) -> None:
        if max_documents is not None and max_documents < 3:
            raise ValueError(f"max_documents={max_documents} must be at least 3, one for each split.")
        self.name = f"huggingface:{path}" + (f"/{name}" if name else "")
        self.path, self.split, self.text_field = path, split, text_field
        self.max_documents, self.domain_field = max_documents, domain_field
        self.document_start_pattern = document_start_pattern
        self._load_arguments = {
            **{"path": path, "name": name, "split": split, "revision": revision},
            **{"data_files": data_files, "streaming": streaming},
        }

    def settings_key(self) -> dict[str, Any] | None:
        if self._load_arguments["data_files"] is not None or Path(self.path).exists():
            return None  # local files are quick to read, and may change
        return {
            **{key: value for key, value in self._load_arguments.items() if key != "streaming"},
            **{"text_field": self.text_field, "max_documents": self.max_documents},
            **{"domain_field": self.domain_field, "start": self.document_start_pattern},
        }

    def documents(self) -> Iterator[Document]:
        rows = self._rows()
        texts = self._one_a_row(rows) if self.document_start_pattern is None else self._joined(rows)
        num_documents = 0
        for index, (domain, text) in enumerate(islice(texts, self.max_documents)):
            num_documents += 1
            yield Document(f"{self.path}/{self.split}/{index:09d}", domain, text.encode())
        if num_documents == 0:
            raise ValueError(f"The data set {self.path} has no text in split {self.split!r}.")

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        try:
            import datasets
        except ImportError as error:
            raise ValueError(
                "data=huggingface needs the package datasets, which is not installed; "
                "run pip install 'longarch[huggingface]'."
            ) from error
        try:
            yield from datasets.load_dataset(**self._load_arguments)
        except Exception as error:  # every hub and file format has errors of its own
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"The data set {self.path} cannot be read: {reason}") from error

    def _one_a_row(self, rows: Iterator[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
        for row in rows:
            text = self._column(row, self.text_field)
            if text is not None:
                yield self._domain(row), text

    def _joined(self, rows: Iterator[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
        pattern = re.compile(self.document_start_pattern or "")
        domain, parts = "", list[str]()
        for row in rows:
            text = self._column(row, self.text_field)
            if text is None:
                continue
            if pattern.match(text) and parts:
                yield domain, "".join(parts)
                parts = []
            domain = domain if parts else self._domain(row)
            parts.append(text)
        if parts:
            yield domain, "".join(parts)

    def _domain(self, row: Mapping[str, Any]) -> str:
        return self.path if self.domain_field is None else str(self._column(row, self.domain_field))

    def _column(self, row: Mapping[str, Any], field: str) -> str | None:
        value: Any = row
        for key in field.split("."):
            if not isinstance(value, Mapping) or key not in value:
                valid = ", ".join(row)
                raise ValueError(f"The data set {self.path} has no column {field!r}; it has {valid}.")
            value = value[key]
        return None if value is None else str(value)
