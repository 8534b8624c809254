"""The question that is asked of a text, and its answers."""

from __future__ import annotations

import pytest

from tasks.examples import domain_question as module
from tasks.examples.domain_question import classification_prompt


def test_every_domain_is_answered_by_a_letter_of_the_question() -> None:
    question, labels = classification_prompt(tokenizer="byte", domains=["stdlib", "torch", "needle"])
    text = bytes(question).decode()
    assert bytes(labels) == b"ABC"
    assert text.endswith("Answer: ") and "A: stdlib, B: torch, C: needle" in text


def test_more_domains_than_letters_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"27 domains are more than the alphabet's 26"):
        classification_prompt(tokenizer="byte", domains=[str(i) for i in range(27)])


def test_letters_that_share_a_token_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Folding(module.make_tokenizer("byte").__class__):  # type: ignore[misc]
        def encode(self, text: bytes):
            return super().encode(b"x" * len(text))

    monkeypatch.setattr(module, "make_tokenizer", lambda name: Folding())
    with pytest.raises(ValueError, match=r"does not tell the letters A, B apart"):
        classification_prompt(tokenizer="folding", domains=["a", "b"])
