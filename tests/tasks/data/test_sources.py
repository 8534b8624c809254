"""Where documents come from, and what each kind of bad input ends in."""

from __future__ import annotations

import builtins
import json
import os
from pathlib import Path

import pytest

from tasks.data.corpus import load_corpus, split_documents
from tasks.data.huggingface import HuggingFace
from tasks.data.sources import InstalledPackages, Mixture, TextFolder
from tasks.examples.training_mixture import TrainingStream


def write_texts(folder: Path, num_files: int = 5) -> Path:
    """A folder of small text files."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(num_files):
        (folder / f"text_{index}.txt").write_text(f"document {index}\n" * 20, encoding="utf-8")
    return folder


def test_installed_packages_hold_the_source_of_python_and_torch() -> None:
    documents = list(InstalledPackages().documents())
    names = [document.name for document in documents]
    assert {"stdlib/json/decoder.py", "stdlib/argparse.py", "torch/nn/modules/linear.py"} <= set(names)
    assert len(set(names)) == len(names)
    assert {document.domain for document in documents} == {"stdlib", "torch"}
    assert all(document.name.startswith(document.domain + "/") for document in documents)


@pytest.mark.parametrize(
    "part", ["site-packages/", "__pycache__/", "/test/", "/tests/", "/idlelib/", "/tkinter/", "turtledemo"]
)
def test_installed_packages_leave_out_what_is_not_the_package(part: str) -> None:
    assert not [d.name for d in InstalledPackages().documents() if part in d.name]


@pytest.mark.parametrize("name", ["torch/version.py", "stdlib/turtle.py", "_sysconfigdata"])
def test_installed_packages_leave_out_what_a_build_or_distribution_changes(name: str) -> None:
    assert not [d.name for d in InstalledPackages().documents() if name in d.name]


def test_text_folder_reads_recursively_and_in_order(tmp_path: Path) -> None:
    write_texts(tmp_path / "b" / "deep", 1)
    write_texts(tmp_path, 1)
    (tmp_path / "notes.md").write_text("left out by the pattern", encoding="utf-8")
    documents = list(TextFolder(str(tmp_path), pattern="*.txt").documents())
    assert [d.name for d in documents] == ["b/deep/text_0.txt", "text_0.txt"]
    assert [d.domain for d in documents] == ["b", tmp_path.name]
    assert documents[1].text == b"document 0\n" * 20


def test_text_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.path=.*nowhere does not exist\.$"):
        list(TextFolder(str(tmp_path / "nowhere")).documents())


def test_text_folder_without_a_name() -> None:
    with pytest.raises(ValueError, match=r"data\.path is empty; give it the folder"):
        TextFolder("")


def test_text_folder_that_is_a_file(tmp_path: Path) -> None:
    write_texts(tmp_path, 1)
    with pytest.raises(ValueError, match=r"text_0\.txt is a file"):
        list(TextFolder(str(tmp_path / "text_0.txt")).documents())


def test_text_folder_that_is_empty(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no file with text that matches '\*\.txt'"):
        list(TextFolder(str(tmp_path), pattern="*.txt").documents())


def test_text_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    write_texts(tmp_path)
    monkeypatch.setattr(os, "scandir", refuse)  # a test that runs as root can read every folder
    with pytest.raises(ValueError, match=r"cannot be read: Permission denied\.$"):
        list(TextFolder(str(tmp_path)).documents())


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"text\0text", "is a binary file"), (b"caf\xe9", r"is not UTF-8 text \(byte 3\)")],
    ids=["binary", "latin-1"],
)
def test_unreadable_files_are_named_or_counted(
    tmp_path: Path, content: bytes, reason: str, capsys: pytest.CaptureFixture
) -> None:
    write_texts(tmp_path / "texts")
    (tmp_path / "texts" / "odd.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"odd\.txt {reason}"):
        list(TextFolder(str(tmp_path / "texts")).documents())
    for _ in range(2):  # built, and from the cache
        source = TextFolder(str(tmp_path / "texts"), skip_unreadable=True)
        corpus = load_corpus(source=source, cache_dir=str(tmp_path / "cache"))
        assert corpus.num_skipped == corpus.description()["num_skipped_files"] == 1
        assert sum(corpus.description()["num_documents"].values()) == 5
        assert "1 unreadable files left out" in capsys.readouterr().err


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    write_texts(tmp_path)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"gone\.txt cannot be read \(No such file or directory\)"):
        list(TextFolder(str(tmp_path)).documents())


def test_a_folder_whose_links_go_in_circles_is_read_once(tmp_path: Path) -> None:
    write_texts(tmp_path, 2)
    (tmp_path / "again").symlink_to(tmp_path)
    assert len(list(TextFolder(str(tmp_path)).documents())) == 2


def two_folders(folder: Path, num_files: int = 400, num_books: int = 5) -> Mixture:
    """Many short files of two domains, and a few long books."""
    write_texts(folder / "code" / "stdlib", num_files)
    write_texts(folder / "code" / "torch", num_files)
    write_texts(folder / "novels", num_books)
    return Mixture([TextFolder(str(folder / "code")), TextFolder(str(folder / "novels"), domain="books")])


def test_a_mixture_chains_its_sources_and_keeps_names_and_domains(tmp_path: Path) -> None:
    mixture = two_folders(tmp_path, 2, 1)
    found = [(d.name, d.domain) for d in mixture.documents()]
    code = [(f"{d}/text_{i}.txt", d) for d in ("stdlib", "torch") for i in range(2)]
    assert found == [*code, ("text_0.txt", "books")] == [(d.name, d.domain) for d in mixture.documents()]
    assert mixture.name == "text_folder:code+text_folder:novels"


def test_each_domain_of_a_mixture_is_split_as_it_would_be_alone(tmp_path: Path) -> None:
    mixture = two_folders(tmp_path)
    corpus = load_corpus(source=mixture, cache_dir=str(tmp_path / "cache"))
    splits = (corpus.train, corpus.validation, corpus.test)
    for split in splits:
        assert set(split.domains) == {"stdlib", "torch", "books"}
    for source in mixture.sources:
        alone = load_corpus(source=source, cache_dir=str(tmp_path / "cache"))
        for split, other in zip(splits, (alone.train, alone.validation, alone.test), strict=True):
            names = set(alone.train.names) | set(alone.validation.names) | set(alone.test.names)
            assert [name for name in split.names if name in names] == list(other.names)
    names = [d.name for d in mixture.documents()]  # split together, the books would lack one
    assert len(set(split_documents(names)[-5:])) < 3


def test_the_content_hash_of_a_mixture_covers_all_its_sources(tmp_path: Path) -> None:
    mixture, cache = two_folders(tmp_path, 3), str(tmp_path / "cache")
    hashes = [load_corpus(source=mixture, cache_dir=cache).content_hash]
    assert load_corpus(source=mixture, cache_dir=cache).content_hash == hashes[0]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == hashes
    for changed in ("code/stdlib/text_0.txt", "novels/text_0.txt"):
        (tmp_path / changed).write_text("another text", encoding="utf-8")
        hashes.append(load_corpus(source=mixture, cache_dir=cache).content_hash)
    assert len(set(hashes)) == 3


def test_a_mixture_gives_many_short_files_and_few_long_books_the_same_bytes(tmp_path: Path) -> None:
    mixture = two_folders(tmp_path, 30, 6)
    for path in tmp_path.rglob("*.txt"):
        line, num_lines = (b"code\n", 600) if "code" in path.parts else (b"book\n", 40_000)
        path.write_bytes(line * num_lines)
    corpus = load_corpus(source=mixture, cache_dir=str(tmp_path / "cache"))
    for needle_fraction in (0.0, 0.75):
        stream = TrainingStream(
            corpus=corpus,
            num_steps=1,
            batch_tokens=2**18,
            curriculum=[{"until_fraction": 1.0, "sequence_tokens": 256}],
            needle_fraction=needle_fraction,
        )
        text = corpus.tokenizer.decode(stream.batch(0).tokens.flatten().numpy())
        books, code = text.count(b"book"), text.count(b"code")
        assert 0.28 < books / (books + code) < 0.4  # a third: one of three domains


@pytest.mark.parametrize(
    ("num_files", "num_books", "reason"),
    [
        (3, None, r"data\.path=.*novels does not exist\.$"),
        (3, 0, r"data\.path=.*novels holds no file with text that matches '\*'\.$"),
        (3, 2, r"The data's domain 'books' has 2 document\(s\) with text; .* at least 3"),
    ],
)
def test_a_mixture_whose_folder_cannot_serve(
    tmp_path: Path, num_files: int, num_books: int | None, reason: str
) -> None:
    mixture = two_folders(tmp_path, num_files, num_books or 0)
    if num_books is None:
        (tmp_path / "novels").rmdir()
    with pytest.raises(ValueError, match=reason):
        load_corpus(source=mixture, cache_dir=str(tmp_path / "cache"))


def test_a_mixture_counts_unreadable_files_and_refuses_a_name_twice(tmp_path: Path) -> None:
    write_texts(tmp_path / "a")
    (tmp_path / "a" / "odd.txt").write_bytes(b"caf\xe9")
    source = TextFolder(str(tmp_path / "a"), skip_unreadable=True)
    mixture = Mixture([source, TextFolder(str(write_texts(tmp_path / "b", 1)))])
    with pytest.raises(ValueError, match=r"text_folder:b has a document 'text_0\.txt', and so has"):
        list(mixture.documents())
    assert mixture.skipped == ["odd.txt"]


def test_hugging_face_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_datasets(name: str, *rest: object) -> object:
        if name == "datasets":
            raise ImportError(name)
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(ValueError, match=r"run pip install 'longarch\[huggingface\]'\.$"):
        list(HuggingFace("owner/name").documents())


class FakeRows:
    """Stands in for the package `datasets`: remembers how it was called and gives rows."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows, self.calls = rows, []

    def load_dataset(self, **arguments: object) -> list[dict]:
        self.calls.append(arguments)
        return self.rows


def test_hugging_face_joins_the_paragraphs_of_an_article(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [" = First = \n", "one\n", " = = Section = = \n", "two\n", " = Second = \n", "three\n"]
    fake = FakeRows([{"text": row} for row in rows])
    monkeypatch.setitem(__import__("sys").modules, "datasets", fake)
    source = HuggingFace("owner/name", document_start_pattern=r"^ = [^=].*[^=] = \n?$")
    texts = [document.text.decode() for document in source.documents()]
    assert texts == ["".join(rows[:4]), "".join(rows[4:])]


def test_hugging_face_reads_again_from_the_cache_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeRows([{"body": f"text {i}", "meta": {"set": "ab"[i % 2]}} for i in range(40)])
    monkeypatch.setitem(__import__("sys").modules, "datasets", fake)
    arguments = {"text_field": "body", "domain_field": "meta.set", "max_documents": 30}
    corpora = [
        load_corpus(source=HuggingFace("owner/name", **arguments), cache_dir=str(tmp_path)) for _ in range(2)
    ]
    assert len(fake.calls) == 1 and fake.calls[0]["streaming"] is True
    assert corpora[0].content_hash == corpora[1].content_hash
    assert sum(corpora[0].description()["num_documents"].values()) == 30
    assert set(corpora[0].train.domains) == {"a", "b"}
    load_corpus(
        source=HuggingFace("owner/name", **{**arguments, "max_documents": 20}), cache_dir=str(tmp_path)
    )
    assert len(fake.calls) == 2


def test_hugging_face_names_a_column_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", FakeRows([{"body": "text", "id": 1}]))
    with pytest.raises(ValueError, match=r"has no column 'text'; it has body, id\."):
        list(HuggingFace("owner/name").documents())


def test_hugging_face_reads_local_files(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"text {i}"}) for i in range(4)), encoding="utf-8")
    source = HuggingFace("json", data_files=str(path))
    assert [d.text for d in source.documents()] == [f"text {i}".encode() for i in range(4)]
    with pytest.raises(ValueError, match=r"The data set json cannot be read: "):
        list(HuggingFace("json", data_files=str(tmp_path / "gone.jsonl")).documents())
