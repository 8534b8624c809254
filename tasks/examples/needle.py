"""Make contexts in the needle format: real text hides short keys with numbers, and queries for them follow.

    ...text of one document...
    #q=4821
    ...text of the same document...
    #q=

The key is one letter directly before its value. At a query, a convolution of width four sees the key beside
the digits known so far. At a needle, it sees the key beside the first two digits, to which it links the
others. The line is short, so that a short training sequence holds several. Training and evaluation use the
same format.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from tasks.data.corpus import Split
from tasks.data.sampling import DocumentSampler
from tasks.data.tokenizers import Tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VALUE_DIGITS = 4

#: Number of letters from which keys are drawn. It is small, so that a small model meets each of them often.
#: With more needles than that, keys are drawn from as many letters as there are needles; a model then meets
#: letters that it was not trained on, unless its training has as many needles.
NUM_KEYS = 8

#: Depths for training are drawn from a uniform range that reaches this far past either end of the text.
END_SHARE = 0.25


class Needles(NamedTuple):
    """One context with its needles and queries.

    tokens:        ids (context_tokens,). They end with the answer of the last query, or, where the maker's
                   max_trailing_tokens is positive, with a line feed and text after it.
    needle_spans:  [start, stop) of each needle's line, in the order of their positions.
    query_spans:   [start, stop) of each query up to its answer, in the order of the queries.
    answer_spans:  [start, stop) of each answer, in the order of the queries.
    depth_tokens:  place where the line of the first query's needle begins.
    """

    tokens: np.ndarray
    needle_spans: list[tuple[int, int]]
    query_spans: list[tuple[int, int]]
    answer_spans: list[tuple[int, int]]
    depth_tokens: int


class NeedleMaker:
    """Maker of contexts from a split's documents.

    num_needles: needles per context, all with different keys.
    num_queries: queries per context. The first one is for the needle at the given depth. Each other query is
                 for any needle, even for that of the query before it: if every needle came once, a model
                 would learn that the latest number is never the answer. There may be more queries than
                 needles.
    min_needles: if given, a context has between min_needles and num_needles needles. Models first learn
                 contexts of few needles, where a guess is often right, and these lead to the others.
    min_queries: if given, a context has between min_queries and num_queries queries. If there were always
                 many, every context would end with nothing but answers, and a model would not learn to find a
                 needle close before the query.
    max_trailing_tokens: largest number of tokens, a line feed and text, after the last answer. The number is
                 drawn evenly, as far as the context has room. Without them, every training context would end
                 at the same place of an architecture's mini-batches, and a model would learn to answer only
                 there.
    Raises ValueError where a number is not positive, num_needles exceeds the number of letters, min_needles
    exceeds num_needles, or min_queries exceeds num_queries.
    """

    def __init__(
        self,
        *,
        split: Split,
        num_needles: int = 4,
        num_queries: int = 1,
        min_needles: int | None = None,
        min_queries: int | None = None,
        max_trailing_tokens: int = 0,
    ) -> None:
        for name, value in (("num_needles", num_needles), ("num_queries", num_queries)):
            if value < 1:
                raise ValueError(f"{name}={value} must be positive.")
        self.min_needles = num_needles if min_needles is None else min_needles
        self.min_queries = num_queries if min_queries is None else min_queries
        if max_trailing_tokens < 0:
            raise ValueError(f"max_trailing_tokens={max_trailing_tokens} must not be negative.")
        if num_needles > len(LETTERS):
            raise ValueError(f"num_needles={num_needles} must be at most {len(LETTERS)}, one per letter.")
        if not 1 <= self.min_needles <= num_needles:
            raise ValueError(f"min_needles={min_needles} must lie between 1 and num_needles={num_needles}.")
        if not 1 <= self.min_queries <= num_queries:
            raise ValueError(f"min_queries={min_queries} must lie between 1 and num_queries={num_queries}.")
        self.split, self.num_needles, self.num_queries = split, num_needles, num_queries
        self.max_trailing_tokens = max_trailing_tokens
        self._tokenizer = split.tokenizer
        self._newline = self._encode("\n")
        self._values = _values_of_one_length(self._tokenizer)
        self.answer_tokens = self._values.shape[1]
        self._samplers: dict[int, DocumentSampler] = {}

    @property
    def num_values(self) -> int:
        """Return how many numbers a needle may hold. Chance is one divided by it."""
        return len(self._values)

    def check(self, context_tokens: int) -> None:
        """Raise ValueError where not every context of this length can be made."""
        self._draw(context_tokens, self.num_needles, self.num_queries, np.random.default_rng(0), None)

    def draw(self, context_tokens: int, rng: np.random.Generator, depth: float | None = None) -> Needles:
        """Return a context of exactly context_tokens tokens, including the answers.

        depth: depth of the first query's needle; 0 is the beginning of the text and 1 its end. The depths of
               the others are uniform. By default, all depths are drawn, with a share for either end.

        A needle stands at the last line end before its depth. At depth 1, it stands after the text, which may
        end within a line. Raises ValueError where the needles leave no room for text, or no document is long
        enough."""
        num_needles = int(rng.integers(self.min_needles, self.num_needles + 1))
        num_queries = int(rng.integers(self.min_queries, self.num_queries + 1))
        return self._draw(context_tokens, num_needles, num_queries, rng, depth)

    def _draw(
        self,
        context_tokens: int,
        num_needles: int,
        num_queries: int,
        rng: np.random.Generator,
        depth: float | None,
    ) -> Needles:
        values = self._values[rng.integers(len(self._values), size=num_needles)]
        letters = list(LETTERS[: max(NUM_KEYS, self.num_needles)])
        keys = rng.choice(letters, size=num_needles, replace=False)
        prefixes = [self._encode(f"#{key}=") for key in keys]
        lines = [
            np.concatenate([prefix, value, self._newline])
            for prefix, value in zip(prefixes, values, strict=True)
        ]
        queries = [0, *rng.integers(num_needles, size=num_queries - 1).tolist()]
        tail = [lines[index] for index in queries]
        num_tail = sum(len(line) for line in tail) - len(self._newline)
        num_text = context_tokens - num_tail - sum(len(line) for line in lines)
        if num_text < 1:
            raise ValueError(
                f"context_tokens={context_tokens} leaves no room for text beside {num_needles} needles "
                f"and {num_queries} queries; use at least {context_tokens - num_text + 1}."
            )
        num_trailing = int(rng.integers(min(self.max_trailing_tokens, num_text - 1) + 1))
        text = self._text(context_tokens, num_text, rng)
        text, trailing = np.split(text, [num_text - num_trailing])
        depths = rng.random(num_needles)
        if depth is None:
            # Draw the ends often enough to be learned. A needle just before its query, or at the very
            # beginning, would otherwise be so rare that models fail there.
            depths = np.clip((depths - 0.5) * (1 + 2 * END_SHARE) + 0.5, 0.0, 1.0)
        else:
            depths[0] = depth
        order = np.argsort(depths, kind="stable")
        positions = self._line_ends_before(text, depths[order])

        pieces, needle_spans, depth_tokens, previous, length = [], [], 0, 0, 0
        for index, position in zip(order, positions.tolist(), strict=True):
            pieces += [text[previous:position], lines[index]]
            start = length + position - previous
            length = start + len(lines[index])
            needle_spans.append((start, length))
            previous = position
            if index == 0:
                depth_tokens = start
        pieces.append(text[previous:])
        length += len(text) - previous
        query_spans, answer_spans = [], []
        for index in queries:
            start = length + len(prefixes[index])
            pieces.append(lines[index])
            query_spans.append((length, start))
            answer_spans.append((start, start + self.answer_tokens))
            length += len(lines[index])
        # The pieces have one token too many: the last line feed, or the end of the trailing text.
        tokens = np.concatenate([*pieces, trailing])[:context_tokens]
        return Needles(tokens, needle_spans, query_spans, answer_spans, depth_tokens)

    def _encode(self, text: str) -> np.ndarray:
        return self._tokenizer.encode(text.encode()).tokens

    def _sampler(self, context_tokens: int) -> DocumentSampler:
        if context_tokens not in self._samplers:
            # A document longer than the whole context is always long enough for the text.
            self._samplers[context_tokens] = DocumentSampler(self.split, min_tokens=context_tokens + 1)
        return self._samplers[context_tokens]

    def _text(self, context_tokens: int, num_text: int, rng: np.random.Generator) -> np.ndarray:
        document = self.split.document(self._sampler(context_tokens).draw(rng))
        start = int(rng.integers(1, len(document) - num_text + 1))  # after the document-start token
        return np.asarray(document[start : start + num_text])

    def _line_ends_before(self, text: np.ndarray, depths: np.ndarray) -> np.ndarray:
        """Return the places of insertion: the end for depth 1, else the last line end or start before."""
        starts = np.concatenate([[0], np.flatnonzero(self._tokenizer.is_line_end[text]) + 1])
        wanted = np.rint(depths * len(text)).astype(np.int64)
        walked_back = starts[np.searchsorted(starts, wanted, side="right") - 1]
        return np.where(depths >= 1.0, len(text), walked_back)


@cache
def _values_of_one_length(tokenizer: Tokenizer) -> np.ndarray:
    """Return the tokens of the 4-digit numbers (0000 to 9999) whose encoding has the commonest length (N, A).

    One length makes the rows of a batch agree. With byte tokens, these are all numbers. Encoding them takes a
    tenth of a second."""
    numbers = (f"{value:0{VALUE_DIGITS}d}" for value in range(10**VALUE_DIGITS))
    encoded = [tokenizer.encode(number.encode()).tokens for number in numbers]
    commonest = np.bincount([len(tokens) for tokens in encoded]).argmax()
    values = np.stack([tokens for tokens in encoded if len(tokens) == commonest])
    values.setflags(write=False)  # every maker has the same array
    return values
