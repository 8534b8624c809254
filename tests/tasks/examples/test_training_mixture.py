"""The training stream: a function of the settings and the step, with weights where they belong."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from tasks.data.corpus import Corpus, load_corpus
from tasks.data.sources import TextFolder
from tasks.examples.domain import ExpertExamples
from tasks.examples.training_mixture import TrainingStream

CURRICULUM = [
    {"until_fraction": 0.25, "sequence_tokens": 128},
    {"until_fraction": 1.0, "sequence_tokens": 256},
]


def make_stream(corpus: Corpus, **settings: Any) -> TrainingStream:
    defaults: dict[str, Any] = {"num_steps": 40, "batch_tokens": 1024, "curriculum": CURRICULUM}
    return TrainingStream(corpus=corpus, **{**defaults, **settings})


def test_a_batch_depends_on_the_step_alone(corpus: Corpus) -> None:
    stream, resumed = make_stream(corpus), make_stream(corpus)
    in_order = [stream.batch(step) for step in range(20)]
    for step in (19, 3, 11):  # another stream, asked in another order
        for expected, tensor in zip(in_order[step], resumed.batch(step), strict=True):
            assert torch.equal(expected, tensor)
    assert not torch.equal(in_order[0].tokens, in_order[1].tokens)
    assert not torch.equal(in_order[0].tokens, make_stream(corpus, seed=1).batch(0).tokens)


def test_the_curriculum_places_the_lengths(corpus: Corpus) -> None:
    stream = make_stream(corpus)
    assert stream.trained_lengths_tokens == (128, 256)
    assert [tuple(stream.batch(step).tokens.shape) for step in (0, 9, 10, 39)] == [
        (8, 128),
        (8, 128),
        (4, 256),
        (4, 256),
    ]


def test_targets_are_the_next_tokens(corpus: Corpus) -> None:
    tokens, targets, weights = make_stream(corpus).batch(0)
    assert tokens.dtype == targets.dtype == torch.int64 and weights.dtype == torch.float32
    assert torch.equal(tokens[:, 1:], targets[:, :-1])


def test_the_loss_of_a_needle_row_is_on_its_answers_and_text(corpus: Corpus) -> None:
    stream = make_stream(
        corpus, needle_fraction=1.0, num_needles=3, num_queries=2, answer_weight=5.0, text_weight=0.5
    )
    for row_targets, row_weights in zip(*stream.batch(30)[1:], strict=True):
        text = bytes(row_targets.tolist())
        by_weight = {w: np.flatnonzero(row_weights.numpy() == w) for w in (0.0, 0.5, 5.0)}
        assert sum(len(places) for places in by_weight.values()) == 256
        answers = bytes(row_targets[by_weight[5.0]].tolist())
        asked = re.findall(rb"#([a-z])=(\d{4})", text)[-2:]
        assert answers == b"".join(number for _, number in asked)
        unweighted = bytes(row_targets[by_weight[0.0]].tolist())
        # A needle that opens the row loses its first byte, which is no target.
        assert len(re.findall(rb"(?:^|#)[a-z]=", unweighted)) == 5
        assert len(by_weight[0.0]) == 3 * 8 + 2 * 3 + 1 - (not unweighted.startswith(b"#"))
        assert not re.search(rb"#[a-z]=", bytes(row_targets[by_weight[0.5]].tolist()))


def test_a_row_may_hold_fewer_needles(corpus: Corpus) -> None:
    stream = make_stream(corpus, needle_fraction=1.0, num_needles=3, min_needles=1, num_queries=1)
    rows = torch.cat([stream.batch(step).targets for step in range(10, 20)])
    numbers = [len(re.findall(rb"[a-z]=\d{4}\n", bytes(row.tolist()))) for row in rows]
    assert set(numbers) == {1, 2, 3}


def test_the_share_of_needle_rows_holds_on_average(corpus: Corpus) -> None:
    stream = make_stream(corpus, needle_fraction=0.3, batch_tokens=512, num_steps=400)
    batches = [stream.batch(step) for step in range(200, 400)]
    share = np.mean([(batch.weights == 8.0).any(1).float().mean().item() for batch in batches])
    assert abs(share - 0.3) < 0.05
    assert not (make_stream(corpus, needle_fraction=0.0).batch(0).weights != 1).any()


def test_a_stage_may_have_a_share_of_needles_of_its_own(corpus: Corpus) -> None:
    stages = [{**CURRICULUM[0], "needle_fraction": 1.0}, CURRICULUM[1]]
    stream = make_stream(corpus, curriculum=stages, needle_fraction=0.0)
    assert (stream.batch(9).weights == 8.0).any(1).all()
    assert not (stream.batch(10).weights == 8.0).any()


def test_a_stage_may_have_needles_and_queries_of_its_own(corpus: Corpus) -> None:
    own = {"needle_fraction": 1.0, "num_needles": 2, "min_needles": 1, "num_queries": 3}
    stream = make_stream(corpus, curriculum=[{**CURRICULUM[0], **own}, CURRICULUM[1]], needle_fraction=1.0)
    for step, num_needles, num_queries in ((0, {1, 2}, 3), (30, {4}, 4)):
        batch = stream.batch(step)
        lines = [len(re.findall(rb"[a-z]=\d{4}", bytes(row.tolist()))) for row in batch.targets]
        assert {n - num_queries for n in lines} == num_needles
        assert ((batch.weights == 8.0).sum(1) == 4 * num_queries).all()


def test_a_stage_may_ask_any_number_of_queries(corpus: Corpus) -> None:
    stages = [CURRICULUM[0], {**CURRICULUM[1], "min_queries": 1}]
    stream = make_stream(corpus, curriculum=stages, needle_fraction=1.0, num_queries=3)
    for steps, num_queries in ((range(5), {3}), (range(30, 40), {1, 2, 3})):
        answers = torch.cat([(stream.batch(step).weights == 8.0).sum(1) for step in steps])
        assert set((answers / 4).tolist()) == num_queries


def test_a_stages_own_number_of_needles_is_its_least_too(corpus: Corpus) -> None:
    stage = {"until_fraction": 1.0, "sequence_tokens": 256, "num_needles": 2, "needle_fraction": None}
    stream = make_stream(corpus, curriculum=[stage], needle_fraction=1.0, num_needles=4)
    lines = [len(re.findall(rb"[a-z]=\d{4}", bytes(row.tolist()))) for row in stream.batch(0).targets]
    assert set(lines) == {2 + 4}, "the stream's four queries, and what the stage says null to is the stream's"


def test_a_held_out_mixture_that_cannot_be_made_is_an_error(tmp_path: Any) -> None:
    for index in range(40):
        (tmp_path / f"{index}.txt").write_text(f"{index}: " + "some words and lines\n" * 15, encoding="utf-8")
    corpus = load_corpus(source=TextFolder(str(tmp_path), pattern="*.txt"), cache_dir=str(tmp_path / "cache"))
    lengths = [len(corpus.validation.document(i)) for i in range(corpus.validation.num_documents)]
    stage = {"until_fraction": 1.0, "sequence_tokens": max(lengths) + 1}
    stream = make_stream(corpus, curriculum=[stage], needle_fraction=0.0)
    assert len(list(stream.validation_batches())) == 4
    stream.stages = (dataclasses.replace(stream.stages[0], needle_fraction=0.5),)
    with pytest.raises(ValueError, match="no document of"):
        next(stream.mixture_batches())


def test_training_reads_training_documents_only(corpus: Corpus) -> None:
    documents = [corpus.tokenizer.decode(corpus.train.document(i)) for i in range(corpus.train.num_documents)]
    stream = make_stream(corpus, needle_fraction=0.0)
    for row in stream.batch(0).tokens:
        assert any(corpus.tokenizer.decode(row.numpy()) in document for document in documents)
    held_out = [
        corpus.tokenizer.decode(corpus.validation.document(i)) for i in range(corpus.validation.num_documents)
    ]
    for batch in stream.validation_batches():
        for row in batch.tokens:
            assert any(corpus.tokenizer.decode(row.numpy()) in document for document in held_out)


def test_validation_is_the_same_for_every_seed(corpus: Corpus) -> None:
    one, other = (
        list(make_stream(corpus, seed=s, num_validation_batches=2).validation_batches()) for s in (0, 1)
    )
    assert len(one) == 2 and one[0].tokens.shape == (4, 256)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("share", "by_batch"), [(0.5, [2, 2]), (0.375, [1, 2]), (0.0, [0, 0]), (1.0, [4, 4])]
)
def test_the_held_out_mixture_has_the_last_stages_share(
    corpus: Corpus, share: float, by_batch: list[int]
) -> None:
    one, other = (
        list(
            make_stream(corpus, needle_fraction=share, seed=seed, num_validation_batches=2).mixture_batches()
        )
        for seed in (0, 1)
    )
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(one, other, strict=True))
    assert [(batch.weights == 8.0).any(1).sum().item() for batch in one] == by_batch
    held_out = b"".join(
        corpus.tokenizer.decode(corpus.validation.document(i)) for i in range(corpus.validation.num_documents)
    )
    for batch in one:
        for row, weights in zip(batch.tokens, batch.weights, strict=True):
            text = corpus.tokenizer.decode(row.numpy())
            if (weights == 8.0).any():
                pieces = re.split(rb"#[a-z]=\d{0,4}\n?", text)
                assert max(pieces, key=len) in held_out


def test_short_documents_share_a_row_and_no_target_crosses(tmp_path: Any) -> None:
    for index in range(30):
        (tmp_path / f"{index}.txt").write_text(f"<{index:02d} is a short text>", encoding="utf-8")
    corpus = load_corpus(source=TextFolder(str(tmp_path), pattern="*.txt"), cache_dir=str(tmp_path / "cache"))
    start = corpus.tokenizer.document_start_id
    stream = make_stream(corpus, needle_fraction=0.0)
    _, targets, weights = stream.batch(0)
    assert torch.equal(weights == 0, targets == start)
    assert (targets == start).sum() >= 8 * 4


def test_domains_are_seen_equally_often(tmp_path: Any) -> None:
    for index in range(30):
        folder = tmp_path / ("short" if index % 2 else "long")
        folder.mkdir(exist_ok=True)
        folder.joinpath(f"{index}.txt").write_text("s" * 200 if index % 2 else "l" * 3000, encoding="utf-8")
    corpus = load_corpus(source=TextFolder(str(tmp_path), pattern="*.txt"), cache_dir=str(tmp_path / "cache"))
    settings: dict[str, Any] = {"needle_fraction": 0.0, "batch_tokens": 2**16}
    share = (make_stream(corpus, **settings).batch(0).tokens == ord("s")).float().mean()
    assert abs(share - 0.5) < 0.1
    share = (
        (make_stream(corpus, **settings, is_domain_balanced=False).batch(0).tokens == ord("s")).float().mean()
    )
    assert share < 0.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps=0 must be positive"),
        ({"batch_tokens": -1}, "batch_tokens=-1 must be positive"),
        ({"needle_fraction": 1.5}, "needle_fraction=1.5"),
        ({"answer_weight": -1.0}, "answer_weight=-1.0"),
        ({"curriculum": []}, "at least one stage"),
        ({"curriculum": [{"until_fraction": 0.5, "sequence_tokens": 64}]}, "must rise from above 0 to 1"),
        ({"curriculum": [{"until_fraction": 1.0, "sequence_tokens": 0}]}, "sequence_tokens=0"),
        ({"curriculum": [{"until_fraction": 1.0, "tokens": 64}]}, "has the keys until_fraction"),
        ({"curriculum": [{"until_fraction": None, "sequence_tokens": 64}]}, "has the keys until_fraction"),
        ({"curriculum": [{"until_fraction": 1.0, "sequence_tokens": 10**6}]}, "no document of"),
        ({"curriculum": [{"until_fraction": 1.0, "sequence_tokens": 62}]}, "leaves no room"),
    ],
)
def test_settings_that_make_no_sense_are_refused(corpus: Corpus, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_stream(corpus, **settings)


@pytest.mark.parametrize("domain", ["needle", "any", "programs", "stories"])
def test_expert_examples_give_prompts_and_right_answers(corpus: Corpus, domain: str) -> None:
    examples = ExpertExamples(
        split=corpus.train, domain=domain, batch_size=3, prompt_tokens=200, num_answer_tokens=2
    )
    prompts, answers = examples(7)
    assert prompts.shape == (3, 200) and answers.shape == (3, 4 if domain == "needle" else 2)
    assert torch.equal(prompts, examples(7)[0]) and not torch.equal(prompts, examples(8)[0])
    for prompt, answer in zip(prompts.numpy(), answers.numpy(), strict=True):
        text = corpus.tokenizer.decode(np.concatenate([prompt, answer]))
        if domain == "needle":
            assert text.count(text[-len("#a=1234") :]) == 2
        else:
            names = [i for i, name in enumerate(corpus.train.domains) if domain in (name, "any")]
            assert any(text in corpus.tokenizer.decode(corpus.train.document(i)) for i in names)


@pytest.mark.parametrize("step", [0, 7])
def test_no_two_splits_ask_for_the_same_numbers(corpus: Corpus, step: int) -> None:
    """What is chosen on validation prompts and measured on test prompts was never the training's answer."""
    splits = (corpus.train, corpus.validation, corpus.test)
    make = partial(ExpertExamples, domain="needle", batch_size=16, prompt_tokens=100)
    rows = [{tuple(row) for row in make(split=split)(step)[1].tolist()} for split in splits]
    assert all(len(row) > 12 for row in rows)
    for index, row in enumerate(rows):
        assert len(row & rows[index - 1]) <= 1, "of 10,000 numbers, two draws of 16 share hardly one"


def test_expert_examples_of_an_unknown_domain_are_refused(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="no document of domain 'poems'"):
        ExpertExamples(split=corpus.train, domain="poems", batch_size=1, prompt_tokens=8)
