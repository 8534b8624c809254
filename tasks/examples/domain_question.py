"""Make the question which kind of text a model has read, and the letters that answer it."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase

from tasks.data.tokenizers import make_tokenizer


def classification_prompt(*, tokenizer: str, domains: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the tokens of the question, and one answer token per domain, in the order of the domains.

    tokenizer: as in `tasks.data.tokenizers.make_tokenizer`.

    The question is multiple choice, so that the answer is one token, whatever the names of the domains: the
    last token of the letter's encoding. Raises ValueError where there are more domains than letters, or two
    letters end in the same token.
    """
    if len(domains) > len(ascii_uppercase):
        raise ValueError(
            f"{len(domains)} domains are more than the alphabet's {len(ascii_uppercase)} letters."
        )
    letters = ascii_uppercase[: len(domains)]
    choices = ", ".join(f"{letter}: {domain}" for letter, domain in zip(letters, domains, strict=True))
    question = f"\n\nQuestion: What kind of text is this? {choices}.\nAnswer: "
    encoder = make_tokenizer(tokenizer)
    labels = [int(encoder.encode(letter.encode()).tokens[-1]) for letter in letters]
    if len(set(labels)) < len(labels):
        raise ValueError(f"The tokenizer {tokenizer!r} does not tell the letters {', '.join(letters)} apart.")
    return [int(token) for token in encoder.encode(question.encode()).tokens], labels
