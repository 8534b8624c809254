"""Read prompts, answer them, and score text: the one loop that every task uses.

A caller makes an empty state, lets an adaptive model adapt it (`dispatch`, `select_domain`), and then
calls one or more of:

    read           a prompt, in chunks of bounded memory
    branch         a copy of what was read, to go on from it twice
    generate       an answer, greedily or sampled
    score_answers  the probability of given answers to the prompt that was read
    score_text     the loss of every token of a text

Glossary beside the project's: P tokens of a prompt, A tokens of an answer. Rows of a batch have equal
length. Nothing here tracks gradients.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from archs.base import SequenceModel, State, clone_state

#: Most elements of the logits that one scored chunk may have: 128 MiB in float32.
MAX_LOGITS = 2**25


class Reading(NamedTuple):
    """A prompt that has been read. logits (B, V) predict the next token; state is the model's."""

    logits: Tensor
    state: State


class Answers(NamedTuple):
    """tokens (B, A) and lengths_tokens (B,), int64.

    A row's length counts its tokens up to and including its stop token. After it, the row repeats the
    stop token. A is the length of the longest row where there are stop tokens."""

    tokens: Tensor
    lengths_tokens: Tensor


class AnswerScores(NamedTuple):
    """log_probabilities_nats (B, A), float64: of each token, given the prompt and the tokens before it.
    is_greedy (B, A), bool: whether that token is the most probable one."""

    log_probabilities_nats: Tensor
    is_greedy: Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings for drawing a token. The filters apply in this order.

    temperature: what the logits are divided by.
    top_k:       keep the k most probable tokens, and those as probable as the last of them.
    top_p:       keep the fewest most probable tokens whose probabilities sum to p or more
                 (nucleus sampling, Holtzman et al. 2020, arXiv 1904.09751, section 3.1).

    Raises ValueError where a number is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive; greedy is sampling=None")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be positive, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1, or None for all tokens")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the distribution to draw from: logits (B, V) -> probabilities (B, V), float32."""
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            lowest = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < lowest, -torch.inf)
        if self.top_p is not None:
            probabilities, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
            is_dropped = probabilities.cumsum(dim=-1) - probabilities >= self.top_p  # the mass before it
            is_dropped[..., 0] = False
            logits = logits.masked_fill(is_dropped.scatter(-1, order, is_dropped), -torch.inf)
        return logits.softmax(dim=-1)


@torch.no_grad()
def read(model: SequenceModel, prompt: Tensor, state: State, *, chunk_tokens: int | None = None) -> Reading:
    """Read a prompt (B, P), P >= 1, into `state`, which is consumed.

    chunk_tokens: most tokens of one prefill call. None reads the prompt in one call, and so does every
    model that `reads_whole_prompts`.
    Raises ValueError if chunk_tokens is not positive, the prompt is empty, or the state has no room."""
    _check_chunk(chunk_tokens)
    if chunk_tokens is None or model.reads_whole_prompts:
        chunk_tokens = max(1, prompt.shape[1])
    *chunks, last = prompt.split(chunk_tokens, dim=1)
    for chunk in chunks:
        _, state = model.prefill(chunk, state, num_logits=0)
    logits, state = model.prefill(last, state, num_logits=1)
    return Reading(logits[:, -1], state)


def branch(reading: Reading) -> Reading:
    """Return a copy to go on from: what consumes it leaves `reading` as it was."""
    return Reading(reading.logits, clone_state(reading.state))


@torch.no_grad()
def generate(
    model: SequenceModel,
    reading: Reading,
    *,
    num_tokens: int,
    stop_tokens: Collection[int] = (),
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
) -> Answers:
    """Answer what was read; `reading` is consumed.

    num_tokens:  most tokens of an answer. The state needs room for all but the last of them.
    stop_tokens: a row ends with the first of these. The call ends when every row has ended. Without stop
                 tokens there is no host synchronisation.
    sampling:    None takes the most probable token.
    generator:   the source of the draws, on the model's device; None is torch's own.
    Raises ValueError if num_tokens is not positive, or the state has no room."""
    if num_tokens < 1:
        raise ValueError(f"num_tokens={num_tokens} must be positive")
    logits, state = reading
    stops = torch.tensor(sorted(stop_tokens), dtype=torch.long, device=logits.device)
    has_stopped = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    lengths = torch.full((len(logits),), num_tokens, device=logits.device)
    tokens = [_next_token(logits, sampling, generator)]
    while True:
        if stop_tokens:
            is_last = ~has_stopped & torch.isin(tokens[-1], stops)
            lengths[is_last] = len(tokens)
            has_stopped |= is_last
        if len(tokens) == num_tokens or (stop_tokens and bool(has_stopped.all())):
            return Answers(torch.stack(tokens, dim=1), lengths)
        logits, state = model.decode(tokens[-1], state)
        token = _next_token(logits, sampling, generator)
        tokens.append(torch.where(has_stopped, tokens[-1], token) if stop_tokens else token)


@torch.no_grad()
def score_answers(
    model: SequenceModel, reading: Reading, answers: Tensor, *, chunk_tokens: int | None = None
) -> AnswerScores:
    """Score given answers (B, A), A >= 1, teacher forced; `reading` is consumed.

    chunk_tokens: as in `read`; a chunk also has at most MAX_LOGITS logits.
    Raises ValueError if chunk_tokens is not positive, answers are empty, or the state has no room."""
    _check_chunk(chunk_tokens)
    if answers.shape[1] < 1:
        raise ValueError("an answer to be scored needs at least one token, got 0")
    parts = [(reading.logits[:, None], answers[:, :1])]
    if answers.shape[1] > 1:
        parts += _scored_chunks(model, answers[:, :-1], answers[:, 1:], reading.state, chunk_tokens)
    log_probabilities = [_log_probabilities(logits.double(), targets) for logits, targets in parts]
    is_greedy = [logits.argmax(-1) == targets for logits, targets in parts]
    return AnswerScores(torch.cat(log_probabilities, dim=1), torch.cat(is_greedy, dim=1))


@torch.no_grad()
def score_text(
    model: SequenceModel, text: Tensor, state: State, *, chunk_tokens: int | None = None
) -> Tensor:
    """Return the loss in nats (B, T) of every token of a text (B, T + 1) but its first.

    state:        with room for T tokens; it is consumed.
    chunk_tokens: as in `read`; a chunk also has at most MAX_LOGITS logits.
    Losses are in float32, or in float64 for a model in float64.
    Raises ValueError if chunk_tokens is not positive, there is nothing to score, or the state has no
    room."""
    _check_chunk(chunk_tokens)
    if text.shape[1] < 2:
        raise ValueError(f"a text to be scored needs at least two tokens, got {text.shape[1]}")
    losses = []
    for logits, targets in _scored_chunks(model, text[:, :-1], text[:, 1:], state, chunk_tokens):
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses.append(-_log_probabilities(precise, targets))
    return torch.cat(losses, dim=1)


def _scored_chunks(
    model: SequenceModel, tokens: Tensor, targets: Tensor, state: State, chunk_tokens: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits (B, C, V) after each token, and the targets (B, C) that they predict."""
    if chunk_tokens is None or model.reads_whole_prompts:
        chunk_tokens = tokens.shape[1]
    size = max(1, min(chunk_tokens, MAX_LOGITS // (len(tokens) * model.vocab_size)))
    for chunk, expected in zip(tokens.split(size, dim=1), targets.split(size, dim=1), strict=True):
        logits, state = model.prefill(chunk, state, num_logits=chunk.shape[1])
        yield logits, expected


def _log_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (B, C, V), targets (B, C) -> the targets' log-probabilities (B, C)."""
    return logits.log_softmax(dim=-1).gather(-1, targets[..., None])[..., 0]


def _next_token(logits: Tensor, sampling: Sampling | None, generator: torch.Generator | None) -> Tensor:
    """logits (B, V) -> token (B,)."""
    if sampling is None:
        return logits.argmax(dim=-1)
    return torch.multinomial(sampling.probabilities(logits), 1, generator=generator)[:, 0]


def _check_chunk(chunk_tokens: int | None) -> None:
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be positive")
