"""The needle format: what stands where, and how long the whole is."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tasks.data.corpus import Corpus
from tasks.examples.needle import NeedleMaker, Needles

NEEDLE = re.compile(rb"#([a-z])=(\d{4})\n")


def draw(
    corpus: Corpus, context_tokens: int, depth: float | None = None, seed: int = 0, **settings: int
) -> Needles:
    maker = NeedleMaker(split=corpus.test, **settings)
    return maker.draw(context_tokens, np.random.default_rng(seed), depth)


@pytest.mark.parametrize("context_tokens", [127, 128, 129, 1000, 4096])
@pytest.mark.parametrize(("num_needles", "num_queries"), [(1, 1), (4, 1), (3, 3), (2, 5)])
def test_a_context_has_the_exact_length_and_ends_with_the_answer(
    corpus: Corpus, context_tokens: int, num_needles: int, num_queries: int
) -> None:
    maker = NeedleMaker(split=corpus.test, num_needles=num_needles, num_queries=num_queries)
    for seed in range(5):
        needles = maker.draw(context_tokens, np.random.default_rng(seed))
        assert len(needles.tokens) == context_tokens
        assert needles.answer_spans[-1][1] == context_tokens
        assert len(needles.needle_spans) == num_needles
        assert len(needles.answer_spans) == len(needles.query_spans) == num_queries


def test_each_answer_is_the_number_beside_the_key_that_is_asked_for(corpus: Corpus) -> None:
    maker = NeedleMaker(split=corpus.test, num_needles=5, num_queries=3)
    for seed in range(20):
        needles = maker.draw(700, np.random.default_rng(seed))
        text = corpus.tokenizer.decode(needles.tokens)
        hidden = {}
        for start, stop in needles.needle_spans:
            match = NEEDLE.fullmatch(text[start:stop])
            assert match is not None
            hidden[match[1]] = match[2]
        assert len(hidden) == 5
        for query, answer in zip(needles.query_spans, needles.answer_spans, strict=True):
            asked = re.fullmatch(rb"#([a-z])=", text[slice(*query)])
            assert asked is not None and hidden[asked[1]] == text[slice(*answer)]
        first_asked = NEEDLE.match(text, needles.depth_tokens)
        assert first_asked is not None and first_asked[1] == text[slice(*needles.query_spans[0])][-2:-1]


def test_text_may_follow_the_last_answer_which_then_ends_anywhere(corpus: Corpus) -> None:
    maker = NeedleMaker(split=corpus.test, num_needles=2, num_queries=2, max_trailing_tokens=15)
    ends = []
    for seed in range(300):
        needles = maker.draw(200, np.random.default_rng(seed))
        assert len(needles.tokens) == 200
        _, stop = needles.answer_spans[-1]
        ends.append(stop)
        if stop < 200:
            assert corpus.tokenizer.decode(needles.tokens[stop : stop + 1]) == b"\n"
    assert set(ends) == set(range(185, 201)), "every place of a mini-batch of 16"
    # Where there is no room for text after it, the context is made all the same.
    assert len(maker.draw(33, np.random.default_rng(0)).tokens) == 33


def test_keys_are_few_unless_there_are_more_needles(corpus: Corpus) -> None:
    for num_needles, expected in ((3, b"abcdefgh"), (20, b"abcdefghijklmnopqrst")):
        maker = NeedleMaker(split=corpus.test, num_needles=num_needles)
        keys = set()
        for seed in range(60):
            needles = maker.draw(400, np.random.default_rng(seed))
            text = corpus.tokenizer.decode(needles.tokens)
            keys |= {text[start + 1] for start, _ in needles.needle_spans}
        assert keys == set(expected)


def test_any_number_of_needles_from_the_least_on_occurs(corpus: Corpus) -> None:
    for settings, expected in (({"min_needles": 1}, {1, 2, 3}), ({"min_needles": 2}, {2, 3}), ({}, {3})):
        maker = NeedleMaker(split=corpus.test, num_needles=3, **settings)
        numbers = []
        for seed in range(60):
            needles = maker.draw(200, np.random.default_rng(seed))
            text = corpus.tokenizer.decode(needles.tokens)
            assert len(text) == 200 and len(NEEDLE.findall(text)) == len(needles.needle_spans)
            numbers.append(len(needles.needle_spans))
        assert set(numbers) == expected
        assert all(numbers.count(number) >= 10 for number in expected)


def test_any_number_of_queries_from_the_least_on_occurs(corpus: Corpus) -> None:
    for settings, expected in (({"min_queries": 1}, {1, 2, 3}), ({"min_queries": 2}, {2, 3}), ({}, {3})):
        maker = NeedleMaker(split=corpus.test, num_needles=2, num_queries=3, **settings)
        numbers = []
        for seed in range(60):
            needles = maker.draw(200, np.random.default_rng(seed), 1.0)
            text = corpus.tokenizer.decode(needles.tokens)
            assert len(text) == 200 and len(needles.query_spans) == len(needles.answer_spans)
            start, stop = needles.query_spans[0]
            assert text[slice(*needles.needle_spans[-1])].startswith(text[start:stop])
            assert needles.answer_spans[-1][1] == 200
            numbers.append(len(needles.query_spans))
        assert set(numbers) == expected
        assert all(numbers.count(number) >= 10 for number in expected)


def test_a_later_query_is_for_any_needle_the_first_one_included(corpus: Corpus) -> None:
    """The keys of later queries are drawn afresh each time, so that some repeat."""
    maker = NeedleMaker(split=corpus.test, num_needles=4, num_queries=2)
    ranks = []
    for seed in range(200):
        needles = maker.draw(400, np.random.default_rng(seed), 0.0)
        text = corpus.tokenizer.decode(needles.tokens)
        keys = [text[start:stop] for start, stop in needles.query_spans]
        lines = [text[start:stop] for start, stop in needles.needle_spans]
        assert lines[0].startswith(keys[0])
        ranks.append([line[:3] for line in lines].index(keys[1]))
    assert all(25 <= ranks.count(rank) <= 75 for rank in range(4))


def test_there_may_be_more_queries_than_needles(corpus: Corpus) -> None:
    needles = draw(corpus, 300, num_needles=1, num_queries=3)
    text = corpus.tokenizer.decode(needles.tokens)
    (needle,) = (text[start:stop] for start, stop in needles.needle_spans)
    assert text.count(needle[:-1]) == 1 + 3


def test_the_text_around_the_needles_is_consecutive_text_of_one_document(corpus: Corpus) -> None:
    needles = draw(corpus, 900, num_needles=4)
    kept = np.ones(len(needles.tokens), dtype=bool)
    for start, stop in [*needles.needle_spans, *needles.query_spans, *needles.answer_spans]:
        kept[start:stop] = False
    text = corpus.tokenizer.decode(needles.tokens[kept])
    assert len(text) > 700
    documents = [corpus.tokenizer.decode(corpus.test.document(i)) for i in range(corpus.test.num_documents)]
    assert sum(text in document for document in documents) == 1


def test_depths_walk_back_to_a_line_end(corpus: Corpus) -> None:
    maker = NeedleMaker(split=corpus.test, num_needles=1)
    for depth in (0.0, 0.1, 0.25, 0.5, 0.9, 1.0):
        for seed in range(10):
            needles = maker.draw(2000, np.random.default_rng(seed), depth)
            text = corpus.tokenizer.decode(needles.tokens)
            length = len(NEEDLE.search(text)[0])
            num_text = 2000 - length - len("#a=") - 4
            wanted = round(depth * num_text)
            achieved = needles.depth_tokens
            if depth == 0.0:
                assert achieved == 0
            elif depth == 1.0:
                assert achieved == num_text
            else:
                assert achieved <= wanted
                assert achieved == 0 or text[achieved - 1 : achieved] == b"\n"
                assert b"\n" not in text[achieved + length : wanted + length]


def test_depth_counts_the_needles_that_stand_before(corpus: Corpus) -> None:
    needles = draw(corpus, 600, 1.0, num_needles=4)
    assert needles.depth_tokens == needles.needle_spans[-1][0]
    assert needles.needle_spans == sorted(needles.needle_spans)
    assert draw(corpus, 600, 0.0, num_needles=4).depth_tokens == 0


def test_drawn_depths_reach_both_ends_of_the_text(corpus: Corpus) -> None:
    maker = NeedleMaker(split=corpus.test, num_needles=1)
    num_text = 600 - len("#a=1234\n") - len("#a=1234")
    drawn = [maker.draw(600, np.random.default_rng(seed)).depth_tokens for seed in range(300)]
    assert 20 <= drawn.count(num_text) <= 80 and 20 <= drawn.count(0) <= 100
    assert len(set(drawn)) > 100


def test_examples_are_a_function_of_the_generator(corpus: Corpus) -> None:
    first, again, other = (draw(corpus, 400, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.tokens, again.tokens)
    assert not np.array_equal(first.tokens, other.tokens)


def test_a_context_without_room_for_the_needles_names_the_least(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match=r"context_tokens=30 leaves no room .* use at least 40\.$"):
        draw(corpus, 30, num_needles=4)
    assert len(draw(corpus, 40, num_needles=4).tokens) == 40
    with pytest.raises(ValueError, match=r"use at least 40\.$"):
        draw(corpus, 39, num_needles=4)


def test_a_length_is_checked_for_the_most_needles_that_may_be_drawn(corpus: Corpus) -> None:
    maker = NeedleMaker(split=corpus.test, num_needles=20, min_needles=1)
    least = 20 * len("#a=1234\n") + len("#a=1234") + 1
    maker.check(least)
    with pytest.raises(ValueError, match=rf"beside 20 needles and 1 queries; use at least {least}\.$"):
        maker.check(least - 1)


def test_a_context_longer_than_every_document_names_the_longest(corpus: Corpus) -> None:
    name, tokens = corpus.test.longest
    with pytest.raises(
        ValueError, match=rf"no document of 100001 tokens; its longest is {name} with {tokens}"
    ):
        draw(corpus, 100_000)


def test_a_negative_length_of_trailing_text_is_refused(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="max_trailing_tokens=-1 must not be negative"):
        NeedleMaker(split=corpus.test, max_trailing_tokens=-1)


@pytest.mark.parametrize(("num_needles", "num_queries"), [(0, 1), (2, 0), (2, -1)])
def test_counts_that_make_no_sense_are_refused(corpus: Corpus, num_needles: int, num_queries: int) -> None:
    with pytest.raises(ValueError, match=r"num_(needles|queries)="):
        NeedleMaker(split=corpus.test, num_needles=num_needles, num_queries=num_queries)


@pytest.mark.parametrize("min_needles", [0, -1, 4])
def test_a_least_number_that_makes_no_sense_is_refused(corpus: Corpus, min_needles: int) -> None:
    with pytest.raises(ValueError, match=f"min_needles={min_needles} must lie between 1 and num_needles=3"):
        NeedleMaker(split=corpus.test, num_needles=3, min_needles=min_needles)


@pytest.mark.parametrize("min_queries", [0, -1, 4])
def test_a_least_number_of_queries_that_makes_no_sense_is_refused(corpus: Corpus, min_queries: int) -> None:
    with pytest.raises(ValueError, match=f"min_queries={min_queries} must lie between 1 and num_queries=3"):
        NeedleMaker(split=corpus.test, num_queries=3, min_queries=min_queries)


def test_more_needles_than_letters_are_refused(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="num_needles=27 must be at most 26, one per letter"):
        NeedleMaker(split=corpus.test, num_needles=27)
