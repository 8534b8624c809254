"""Read documents: of the installed packages, of a folder of text files, or of several sources at once."""

from __future__ import annotations

import fnmatch
import os
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

#: Folders that hold no source of the package itself, or that some distributions leave out or package apart
#: (Debian and Fedora do so with idlelib, tkinter, turtledemo, distutils and others).
EXCLUDED_FOLDERS = frozenset(
    {
        *("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "_internal"),
        *("idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3", "distutils", "lib-dynload"),
        "pydoc_data",  # one generated file of documentation
    }
)

#: Files that the build or the distribution writes, and turtle.py, which goes with tkinter.
EXCLUDED_FILES = ("_sysconfigdata*", "sitecustomize.py", "usercustomize.py", "turtle.py")
BUILD_FILES = frozenset({"torch/version.py"})


class Document(NamedTuple):
    """One document.

    name:   unique in its source, and the same on every machine.
    domain: group of documents for which results are also shown apart.
    """

    name: str
    domain: str
    text: bytes


class Source(ABC):
    """An ordered set of documents.

    is_split_by_domain: whether each domain is split into training, validation and test on its own.
    """

    name: str
    is_split_by_domain = False

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Yield every document, in the same order each time. May be called more than once.

        Raises ValueError with one sentence where there is nothing to read."""

    def settings_key(self) -> dict[str, Any] | None:
        """Return settings by which the cache knows the content, where reading it again would be too slow.

        None where the cache knows the content by reading it."""
        return None

    @property
    def skipped(self) -> list[str]:
        """Return the names that the last `documents()` left out as unreadable."""
        return []


class InstalledPackages(Source):
    """The *.py files of Python's standard library and of the installed torch package.

    This is real code that needs no download and is equal for equal versions. The domains are "stdlib" and
    "torch", and names are like "stdlib/json/decoder.py". Tests, build products, and files that distributions
    package apart are left out.
    """

    name = "installed_packages"

    def __init__(self) -> None:
        self.roots = {
            "stdlib": Path(sysconfig.get_paths()["stdlib"]),
            "torch": Path(torch.__file__).parent,
        }

    def documents(self) -> Iterator[Document]:
        num_documents = 0
        for domain, root in self.roots.items():
            for relative in sorted(_python_files(root)):
                if f"{domain}/{relative}" in BUILD_FILES:
                    continue
                try:
                    text = (root / relative).read_bytes()
                except OSError as error:
                    raise ValueError(f"{root / relative} cannot be read: {error.strerror}.") from error
                num_documents += 1
                yield Document(f"{domain}/{relative}", domain, text)
        if num_documents == 0:
            roots = " and ".join(str(root) for root in self.roots.values())
            raise ValueError(f"There are no Python source files under {roots}; choose data=text_folder.")


def _python_files(root: Path) -> Iterator[str]:
    """Yield the paths of Python files relative to `root`, with forward slashes."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [
            name for name in subfolders if name not in EXCLUDED_FOLDERS and not name.startswith("config-")
        ]
        for name in files:
            if name.endswith(".py") and not any(fnmatch.fnmatch(name, p) for p in EXCLUDED_FILES):
                yield (Path(folder) / name).relative_to(root).as_posix()


class TextFolder(Source):
    """The files of a folder and its subfolders, as UTF-8 text, without those that hold only white space.

    pattern:         the names of files to read, as in fnmatch.
    skip_unreadable: whether to leave out files that cannot be read or are not text (they have a NUL byte or
                     are not UTF-8), and to list them in `skipped`. Otherwise the first one is a ValueError.
    domain:          domain of every file. By default, the domain of a file is the first folder on its path,
                     or the name of the folder itself for files directly inside it.
    """

    def __init__(
        self, path: str, pattern: str = "*", skip_unreadable: bool = False, domain: str | None = None
    ) -> None:
        if not path:
            raise ValueError("data.path is empty; give it the folder of text files: data.path=DIR.")
        self.root = Path(path).expanduser()
        self.name = f"text_folder:{self.root.resolve().name}"
        self.pattern, self.skip_unreadable, self.domain = pattern, skip_unreadable, domain
        self._skipped: list[str] = []

    @property
    def skipped(self) -> list[str]:
        return list(self._skipped)

    def documents(self) -> Iterator[Document]:
        self._skipped = []
        if not self.root.exists():
            raise ValueError(f"data.path={self.root} does not exist.")
        if not self.root.is_dir():
            raise ValueError(f"data.path={self.root} is a file; give the folder that holds the text files.")
        num_documents = 0
        for relative in self._files():
            try:
                text = self._read(relative)
            except ValueError:
                if not self.skip_unreadable:
                    raise
                self._skipped.append(relative)
                continue
            if not text.strip():
                continue
            num_documents += 1
            yield Document(relative, self.domain or self._folder_of(relative), text)
        if num_documents == 0:
            left_out = f" ({len(self._skipped)} unreadable files were left out)" if self._skipped else ""
            raise ValueError(
                f"data.path={self.root} holds no file with text that matches {self.pattern!r}{left_out}."
            )

    def _folder_of(self, relative: str) -> str:
        parts = Path(relative).parts
        return parts[0] if len(parts) > 1 else self.root.resolve().name

    def _files(self) -> list[str]:
        found, visited = [], set()

        def fail(error: OSError) -> None:
            raise ValueError(f"The folder {error.filename} cannot be read: {error.strerror}.") from error

        for folder, subfolders, files in os.walk(self.root, onerror=fail, followlinks=True):
            visited.add(os.path.realpath(folder))
            subfolders[:] = [n for n in subfolders if os.path.realpath(Path(folder) / n) not in visited]
            relative = [(Path(folder) / name).relative_to(self.root).as_posix() for name in files]
            found += [name for name in relative if fnmatch.fnmatch(Path(name).name, self.pattern)]
        return sorted(found)

    def _read(self, relative: str) -> bytes:
        path = self.root / relative
        advice = "remove it, narrow data.pattern, or set data.skip_unreadable=true to leave such files out."
        try:
            text = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}); {advice}") from error
        if b"\0" in text:
            raise ValueError(f"{path} is a binary file, not text; {advice}")
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); {advice}") from error
        return text


class Mixture(Source):
    """The documents of several sources, in the order of the sources, with their own names and domains.

    Every domain is split on its own, as if it were alone. Otherwise the thousands of files of one source
    would fill the splits, and the two dozen books of another might be missing from some. Raises ValueError
    where two sources have a document of the same name, and the errors of the sources.
    """

    is_split_by_domain = True

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self.name = "+".join(source.name for source in self.sources)

    @property
    def skipped(self) -> list[str]:
        return [name for source in self.sources for name in source.skipped]

    def documents(self) -> Iterator[Document]:
        seen: set[str] = set()
        for source in self.sources:
            for document in source.documents():
                if document.name in seen:
                    raise ValueError(
                        f"{source.name} has a document {document.name!r}, and so has a source before it; "
                        "rename the file or its folder."
                    )
                seen.add(document.name)
                yield document
