"""Reading, answering and scoring, on models of every kind of state."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from archs.base import Flops, Phase, SequenceModel, state_tensors
from archs.generate import Reading, Sampling, branch, generate, read, score_answers, score_text

#: A growing cache, a fixed state, a mixture of experts. The contract takes every state in chunks.
ARCHS = ("transformer", "recurrent", "transformer_squared")
TOLERANCE = 1e-9


@pytest.fixture(scope="module", params=ARCHS)
def small(request: pytest.FixtureRequest, new_model: Callable[..., SequenceModel]) -> SequenceModel:
    """A model in float64."""
    return new_model(request.param)


def draw_tokens(model: SequenceModel, num_tokens: int, batch: int = 3) -> Tensor:
    return torch.randint(0, model.vocab_size, (batch, num_tokens), generator=torch.Generator().manual_seed(2))


class LastToken(NamedTuple):
    """The token that was read last (B,)."""

    token: Tensor
    num_tokens: int


class TableModel(SequenceModel):
    """A Markov chain: the next token depends on the last one alone, by a table of logits (V, V)."""

    def __init__(self, table: Tensor, *, reads_whole_prompts: bool = False) -> None:
        super().__init__()
        self.table, self.vocab_size = table, len(table)
        self.reads_whole_prompts = reads_whole_prompts
        self.widths: list[int] = []
        self.num_logits: list[int] = []
        self.num_steps = 0

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]

    def loss(self, tokens: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def init_state(self, batch_size: int, max_context_tokens: int) -> LastToken:
        return LastToken(torch.zeros(batch_size, dtype=torch.long), 0)

    def prefill(self, tokens: Tensor, state: LastToken, num_logits: int = 1) -> tuple[Tensor, LastToken]:
        self.widths.append(tokens.shape[1])
        self.num_logits.append(num_logits)
        logits = self.table[tokens[:, tokens.shape[1] - num_logits :]]
        return logits, LastToken(tokens[:, -1], state.num_tokens + tokens.shape[1])

    def decode(self, token: Tensor, state: LastToken) -> tuple[Tensor, LastToken]:
        self.num_steps += 1
        return self.table[token], LastToken(token, state.num_tokens + 1)

    def state_bytes_at(self, batch_size: int, context_tokens: int) -> int:
        return 8 * batch_size

    def flops(self, context_tokens: int, phase: Phase) -> Flops:
        return Flops()


def counting_model(num_tokens: int = 7) -> TableModel:
    """After token t always comes t + 1, after the last the first."""
    return TableModel(100.0 * torch.eye(num_tokens).roll(1, dims=1))


def read_all(model: SequenceModel, prompt: Tensor, chunk_tokens: int | None = None) -> Reading:
    return read(model, prompt, model.init_state(len(prompt), 64), chunk_tokens=chunk_tokens)


# Reading


@pytest.mark.parametrize("chunk_tokens", [1, 7, 37, 100])
def test_a_prompt_read_in_chunks_is_the_prompt_read_whole(small: SequenceModel, chunk_tokens: int) -> None:
    prompt = draw_tokens(small, 37)
    with torch.no_grad():
        expected = small(prompt)[:, -1]
    reading = read(small, prompt, small.init_state(3, 40), chunk_tokens=chunk_tokens)
    torch.testing.assert_close(reading.logits, expected, rtol=0, atol=TOLERANCE)
    assert reading.state.num_tokens == 37


def test_no_chunk_is_longer_and_the_last_alone_has_logits() -> None:
    model = counting_model()
    read_all(model, draw_tokens(model, 11), chunk_tokens=4)
    assert model.widths == [4, 4, 3] and model.num_logits == [0, 0, 1]


def test_a_model_that_reads_whole_prompts_gets_its_prompt_in_one_call() -> None:
    model = TableModel(torch.eye(7), reads_whole_prompts=True)
    read_all(model, draw_tokens(model, 11), chunk_tokens=4)
    assert model.widths == [11]


def test_a_branch_leaves_what_it_came_from_as_it_was(small: SequenceModel) -> None:
    reading = read(small, draw_tokens(small, 21), small.init_state(3, 30))
    before = [tensor.clone() for tensor in (reading.logits, *state_tensors(reading.state))]
    first = generate(small, branch(reading), num_tokens=5)
    score_answers(small, branch(reading), draw_tokens(small, 5))
    for tensor, copy in zip((reading.logits, *state_tensors(reading.state)), before, strict=True):
        assert torch.equal(tensor, copy)
    assert torch.equal(generate(small, reading, num_tokens=5).tokens, first.tokens)


# Answering


def test_a_greedy_answer_is_what_the_forward_prefers(small: SequenceModel) -> None:
    prompt = draw_tokens(small, 13)
    answers = generate(small, read(small, prompt, small.init_state(3, 20)), num_tokens=6)
    expected = prompt
    with torch.no_grad():
        for _ in range(6):
            expected = torch.cat((expected, small(expected)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(answers.tokens, expected[:, 13:])
    assert answers.lengths_tokens.tolist() == [6, 6, 6]


def test_the_state_needs_no_room_for_the_last_token() -> None:
    model = counting_model()
    generate(model, read(model, draw_tokens(model, 5), model.init_state(3, 8)), num_tokens=4)
    assert model.num_steps == 3


def test_a_row_that_has_stopped_stays_stopped() -> None:
    model = counting_model()
    prompt = torch.tensor([[0], [3], [5], [2]])
    answers = generate(model, read(model, prompt, model.init_state(4, 9)), num_tokens=4, stop_tokens=[4, 6])
    assert answers.tokens.tolist() == [[1, 2, 3, 4], [4, 4, 4, 4], [6, 6, 6, 6], [3, 4, 4, 4]]
    assert answers.lengths_tokens.tolist() == [4, 1, 1, 2]


def test_the_call_ends_when_every_row_has_ended() -> None:
    model = counting_model()
    prompt = torch.tensor([[3], [2]])
    answers = generate(model, read(model, prompt, model.init_state(2, 99)), num_tokens=90, stop_tokens={4})
    assert answers.tokens.tolist() == [[4, 4], [3, 4]] and answers.lengths_tokens.tolist() == [1, 2]
    assert model.num_steps == 1


def test_a_row_without_a_stop_token_has_all_its_tokens() -> None:
    model = counting_model()
    prompt = torch.tensor([[0], [3]])
    answers = generate(model, read(model, prompt, model.init_state(2, 9)), num_tokens=3, stop_tokens=(5,))
    assert answers.tokens.tolist() == [[1, 2, 3], [4, 5, 5]] and answers.lengths_tokens.tolist() == [3, 2]


# Sampling

PROBABILITIES = torch.tensor([0.4, 0.05, 0.25, 0.2, 0.1])


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.4, 0.05, 0.25, 0.2, 0.1]),
        (Sampling(temperature=0.5), [0.16, 0.0025, 0.0625, 0.04, 0.01]),
        (Sampling(top_k=1), [1, 0, 0, 0, 0]),
        (Sampling(top_k=3), [0.4, 0, 0.25, 0.2, 0]),
        (Sampling(top_k=99), [0.4, 0.05, 0.25, 0.2, 0.1]),
        (Sampling(top_p=0.3), [1, 0, 0, 0, 0]),
        (Sampling(top_p=0.6), [0.4, 0, 0.25, 0, 0]),
        (Sampling(top_p=0.7), [0.4, 0, 0.25, 0.2, 0]),
        (Sampling(top_p=1.0), [0.4, 0.05, 0.25, 0.2, 0.1]),
        (Sampling(top_k=3, top_p=0.7), [0.4, 0, 0.25, 0, 0]),  # 0.65 of the 0.85 that the three have
        (Sampling(temperature=0.5, top_p=0.7), [0.16, 0, 0.0625, 0, 0]),
    ],
)
def test_tokens_are_drawn_from_what_the_filters_leave(sampling: Sampling, expected: list[float]) -> None:
    weights = torch.tensor(expected)
    weights = weights / weights.sum()
    torch.testing.assert_close(sampling.probabilities(PROBABILITIES.log()[None])[0], weights)
    model = TableModel(PROBABILITIES.log().expand(5, 5))
    prompt = torch.zeros(4000, 1, dtype=torch.long)
    reading = read(model, prompt, model.init_state(4000, 3))
    generator = torch.Generator().manual_seed(0)
    drawn = generate(model, reading, num_tokens=3, sampling=sampling, generator=generator).tokens
    for step in range(3):
        frequencies = torch.bincount(drawn[:, step], minlength=5) / 4000
        torch.testing.assert_close(frequencies, weights, rtol=0, atol=0.03)
        assert (frequencies[weights == 0] == 0).all()


def test_the_generator_decides_the_draws() -> None:
    model = TableModel(torch.zeros(50, 50))

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        reading = read(model, torch.zeros(2, 1, dtype=torch.long), model.init_state(2, 30))
        return generate(model, reading, num_tokens=20, sampling=Sampling(), generator=generator).tokens

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


# Scoring


@pytest.mark.parametrize("num_tokens", [1, 2, 9])
@pytest.mark.parametrize("chunk_tokens", [None, 3])
def test_scores_of_answers_agree_with_the_forward(
    small: SequenceModel, num_tokens: int, chunk_tokens: int | None
) -> None:
    prompt, answers = draw_tokens(small, 13), draw_tokens(small, 9)[:, :num_tokens]
    with torch.no_grad():
        logits = small(torch.cat((prompt, answers), dim=1))[:, 12:-1]
    answers = torch.where(torch.tensor([[True], [False], [False]]), logits.argmax(-1), answers)
    if num_tokens > 1:  # the first row's answer has become another, and with it its later logits
        with torch.no_grad():
            logits = small(torch.cat((prompt, answers), dim=1))[:, 12:-1]
    reading = read(small, prompt, small.init_state(3, 22), chunk_tokens=chunk_tokens)
    scores = score_answers(small, reading, answers, chunk_tokens=chunk_tokens)
    expected = logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0]
    torch.testing.assert_close(scores.log_probabilities_nats, expected, rtol=0, atol=TOLERANCE)
    assert torch.equal(scores.is_greedy, logits.argmax(-1) == answers)
    assert scores.is_greedy[0, 0]


def test_what_was_answered_greedily_is_scored_as_greedy(small: SequenceModel) -> None:
    reading = read(small, draw_tokens(small, 13), small.init_state(3, 20))
    answers = generate(small, branch(reading), num_tokens=5).tokens
    assert score_answers(small, reading, answers).is_greedy.all()


@pytest.mark.parametrize("chunk_tokens", [None, 1, 7])
def test_losses_of_a_text_agree_with_the_forward(small: SequenceModel, chunk_tokens: int | None) -> None:
    text = draw_tokens(small, 38)
    losses = score_text(small, text, small.init_state(3, 37), chunk_tokens=chunk_tokens)
    with torch.no_grad():
        log_probabilities = small(text[:, :-1]).log_softmax(-1)
    expected = -log_probabilities.gather(-1, text[:, 1:, None])[..., 0]
    assert losses.shape == (3, 37)
    torch.testing.assert_close(losses, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("reads_whole_prompts", [False, True])
def test_the_logits_of_a_scored_chunk_are_bounded(
    monkeypatch: pytest.MonkeyPatch, reads_whole_prompts: bool
) -> None:
    monkeypatch.setattr("archs.generate.MAX_LOGITS", 2 * 7 * 4 + 1)  # four tokens of two rows
    model = TableModel(torch.eye(7), reads_whole_prompts=reads_whole_prompts)
    score_text(model, draw_tokens(model, 12, batch=2), model.init_state(2, 11))
    assert model.widths == model.num_logits == [4, 4, 3]


# Mistakes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: read_all(model, draw_tokens(model, 3), chunk_tokens=0), "chunk_tokens=0 must be"),
        (
            lambda model: generate(model, read_all(model, draw_tokens(model, 3)), num_tokens=0),
            "num_tokens=0 must be positive",
        ),
        (lambda model: score_text(model, draw_tokens(model, 1), None), "at least two tokens, got 1"),
        (lambda model: score_text(model, draw_tokens(model, 3), None, chunk_tokens=-1), "chunk_tokens=-1"),
        (lambda model: Sampling(temperature=0.0), "temperature=0.0 must be positive; greedy"),
        (lambda model: Sampling(top_k=0), "top_k=0 must be positive"),
        (lambda model: Sampling(top_p=0.0), "top_p=0.0 must be above 0"),
        (lambda model: Sampling(top_p=1.5), "top_p=1.5 must be above 0"),
    ],
)
def test_wrong_requests_are_errors(call: Callable[[SequenceModel], object], message: str) -> None:
    model = counting_model()
    with pytest.raises(ValueError, match=message):
        call(model)


def test_an_empty_prompt_and_an_empty_answer_are_errors(small: SequenceModel) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        read(small, draw_tokens(small, 0), small.init_state(3, 4))
    reading = read(small, draw_tokens(small, 4), small.init_state(3, 4))
    with pytest.raises(ValueError, match="at least one token"):
        score_answers(small, reading, draw_tokens(small, 0))
