"""Splits, hashes and the cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tasks.data.corpus import Corpus, load_corpus, split_documents
from tasks.data.sources import Document, Source, TextFolder
from tasks.data.tokenizers import ByteTokenizer

TEXT = Path(__file__).resolve().parent.parent.parent / "corpus"


def load(cache: Path, text: Path = TEXT) -> Corpus:
    return load_corpus(source=TextFolder(str(text)), cache_dir=str(cache))


def test_every_document_is_in_one_split_and_unchanged(corpus: Corpus) -> None:
    seen = []
    for split in (corpus.train, corpus.validation, corpus.test):
        for index, name in enumerate(split.names):
            tokens = split.document(index)
            assert tokens[0] == corpus.tokenizer.document_start_id
            assert corpus.tokenizer.decode(tokens) == (TEXT / name).read_bytes()
            assert split.num_bytes(index) == len(tokens) - 1
            assert split.num_bytes(index, 0, 10) == 9 and split.num_bytes(index, 3, 10) == 7
            seen.append(name)
    assert sorted(seen) == sorted(p.relative_to(TEXT).as_posix() for p in TEXT.rglob("*.txt"))


def test_each_split_of_the_project_text_has_both_kinds_and_long_documents(corpus: Corpus) -> None:
    for split in (corpus.train, corpus.validation, corpus.test):
        assert set(split.domains) == {"stories", "programs"}
        assert split.lengths_tokens.min() > 4 * 1024
    assert sum(path.stat().st_size for path in TEXT.rglob("*.txt")) < 300_000


def test_a_document_keeps_its_split_when_others_come_or_go() -> None:
    names = [f"package/file_{i}.py" for i in range(2000)]
    splits = split_documents(names)
    assert split_documents(names[:500]) == splits[:500]
    assert 60 < splits.count("test") < 140 and 60 < splits.count("validation") < 140


def test_few_documents_still_fill_every_split() -> None:
    for number in range(3, 40):
        assert set(split_documents([f"book_{i}" for i in range(number)])) == {"train", "validation", "test"}


def test_too_few_documents_are_refused(tmp_path: Path) -> None:
    (tmp_path / "only.txt").write_text("text", encoding="utf-8")
    with pytest.raises(ValueError, match=r"has 1 document\(s\) with text"):
        load(tmp_path / "cache", tmp_path)


def test_documents_without_text_are_refused(tmp_path: Path) -> None:
    class Empty(Source):
        name = "empty"

        def documents(self) -> Iterator[Document]:
            yield from (Document(name, "texts", b"") for name in "abc")

    with pytest.raises(ValueError, match="empty holds no text: every document is empty"):
        load_corpus(source=Empty(), cache_dir=str(tmp_path / "cache"))
    for name in "abc":
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / name).touch()
    with pytest.raises(ValueError, match="holds no file with text"):
        load(tmp_path / "cache", tmp_path / "texts")


def test_the_content_hash_covers_names_contents_and_tokenizer(tmp_path: Path) -> None:
    class OtherTokenizer(ByteTokenizer):
        name = "other"

    text = tmp_path / "text"
    shutil.copytree(TEXT, text)
    original = load(tmp_path / "cache", text).content_hash
    assert load(tmp_path / "elsewhere", text).content_hash == original
    other = load_corpus(
        source=TextFolder(str(text)), tokenizer=OtherTokenizer(), cache_dir=str(tmp_path / "cache")
    )
    (text / "stories" / "story_00.txt").rename(text / "stories" / "renamed.txt")
    renamed = load(tmp_path / "cache", text).content_hash
    with (text / "stories" / "renamed.txt").open("a") as file:
        file.write(".")
    changed = load(tmp_path / "cache", text).content_hash
    assert len({original, other.content_hash, renamed, changed}) == 4


def test_a_cache_is_opened_and_not_written_again(tmp_path: Path) -> None:
    folder = tmp_path / load(tmp_path).content_hash
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    corpus = load(tmp_path)
    assert isinstance(corpus.train.tokens, np.memmap)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize("damage", ["changed", "cut", "gone", "meta", "meta-shape"])
def test_a_damaged_cache_is_built_again(tmp_path: Path, damage: str) -> None:
    corpus = load(tmp_path)
    expected = np.array(corpus.train.document(0))
    tokens, meta = (tmp_path / corpus.content_hash / name for name in ("tokens.bin", "meta.json"))
    content = tokens.read_bytes()
    if damage == "changed":
        tokens.unlink()
        tokens.write_bytes(content[:1000] + b"??" + content[1002:])
    elif damage == "cut":
        tokens.unlink()
        tokens.write_bytes(content[:-1001])
    elif damage == "gone":
        tokens.unlink()
    else:
        meta.write_text("{" if damage == "meta" else json.dumps([]), encoding="utf-8")
    rebuilt = load(tmp_path)
    assert np.array_equal(rebuilt.train.document(0), expected)
    assert tokens.read_bytes() == content


def test_jobs_that_build_the_same_corpus_at_once_do_not_clash(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        corpora = list(pool.map(load, [tmp_path] * 4))
    assert len({corpus.content_hash for corpus in corpora}) == 1
    assert [path.name for path in tmp_path.iterdir()] == [corpora[0].content_hash]


def test_the_cache_folder_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGARCH_CACHE", str(tmp_path / "here"))
    corpus = load_corpus(source=TextFolder(str(TEXT)))
    assert (tmp_path / "here" / corpus.content_hash / "tokens.bin").exists()


def test_a_cache_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^The cache folder .* cannot be used .*; set LONGARCH_CACHE"):
        load(tmp_path / "file" / "cache")
