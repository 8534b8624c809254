"""Bytes, and a tokenizer of the hub's format that the test makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tasks.data.corpus import load_corpus
from tasks.data.sources import TextFolder
from tasks.data.tokenizers import ByteTokenizer, make_tokenizer
from tasks.examples.needle import NeedleMaker

TEXT = Path(__file__).resolve().parent.parent.parent / "corpus"


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 400 tokens, trained on tests/corpus."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in sorted(TEXT.rglob("*_0*.txt"))], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_bytes_are_their_own_tokens() -> None:
    tokenizer = make_tokenizer("byte")
    text = "naïve 語\n".encode()
    tokens, byte_lengths = tokenizer.encode(text)
    assert tokens.tolist() == list(text) and byte_lengths is None
    assert tokenizer.decode(np.concatenate([[tokenizer.document_start_id], tokens])) == text
    assert np.flatnonzero(tokenizer.is_line_end).tolist() == [ord("\n")]


def test_hub_tokens_keep_count_of_the_bytes(tokenizer_path: Path) -> None:
    tokenizer = make_tokenizer(str(tokenizer_path))
    text = "The naïve 語 counted 12 loads of 🧂 salt.\n\n".encode()
    tokens, byte_lengths = tokenizer.encode(text)
    assert byte_lengths is not None and len(byte_lengths) == len(tokens) < len(text)
    assert byte_lengths.sum() == len(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.document_start_id == 0 and tokenizer.vocab_size == 400
    prefix = text.decode()[: len("The naïve")].encode()
    num_prefix_tokens = next(i for i in range(len(tokens)) if tokenizer.decode(tokens[: i + 1]) == prefix) + 1
    assert byte_lengths[:num_prefix_tokens].sum() == len(prefix)


def test_hub_tokens_of_no_text(tokenizer_path: Path) -> None:
    tokens, byte_lengths = make_tokenizer(str(tokenizer_path)).encode(b"")
    assert len(tokens) == len(byte_lengths) == 0


def test_hub_corpus_counts_bytes_and_makes_needles(tokenizer_path: Path, tmp_path: Path) -> None:
    corpus = load_corpus(
        source=TextFolder(str(TEXT)), tokenizer=str(tokenizer_path), vocab_size=400, cache_dir=str(tmp_path)
    )
    split = corpus.test
    for index, name in enumerate(split.names):
        num_bytes = (TEXT / name).stat().st_size
        assert split.num_bytes(index) == num_bytes
        assert split.num_bytes(index, 1, 50) + split.num_bytes(index, 50) == num_bytes
    maker = NeedleMaker(split=split, num_needles=3)
    needles = maker.draw(300, np.random.default_rng(0), depth=0.5)
    assert len(needles.tokens) == 300
    start, stop = needles.answer_spans[0]
    assert stop == 300
    answer, query = (
        corpus.tokenizer.decode(needles.tokens[a:b]) for a, b in ((start, stop), needles.query_spans[0])
    )
    assert answer.isdigit() and len(answer) == 4
    assert corpus.tokenizer.decode(needles.tokens).count(query.strip() + answer) == 2


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set data\.vocab_size=257\.$"):
        load_corpus(source=TextFolder(str(TEXT)), tokenizer="byte", vocab_size=256, cache_dir=str(tmp_path))


def test_a_tokenizer_file_that_is_damaged_is_a_sentence(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^The tokenizer .* is neither a readable tokenizer\.json nor"):
        make_tokenizer(str(tmp_path / "tokenizer.json"))


def test_a_tokenizer_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"run pip install 'longarch\[huggingface\]'"):
        make_tokenizer("owner/name")


def test_every_id_fits_the_token_type() -> None:
    tokenizer = ByteTokenizer()
    assert np.iinfo(tokenizer.token_dtype).max >= tokenizer.vocab_size - 1
