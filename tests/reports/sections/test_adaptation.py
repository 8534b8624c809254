"""What the report says of gains over the base and over LoRA."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import ModuleType

import pytest

from harness.record.schema import Point, append
from reports.draw.table import Table
from reports.page.html import render
from reports.results.load import Results, load
from reports.sections.training.adaptation import (
    adaptation_table,
    has_experts,
    mixtures_table,
    section,
    tuning_table,
)

ARCHS = ("mamba", "transformer_squared")
PUBLISHED = Path(__file__).resolve().parent.parent.parent.parent / "reports" / "published" / "cpu_small"

#: Of 100 prompts, how many each adaptation gets right: the first ones.
NUM_RIGHT = {"base": 20, "expert": 40, "lora": 35, "classifier": 40}


def adaptation_point(name: str, seed: int = 0, **changes: object) -> Point:
    is_correct = [1] * NUM_RIGHT[name] + [0] * (100 - NUM_RIGHT[name])
    has_first_pass = name == "classifier"
    values = {
        "cell": {"domain": "torch", "adaptation": name},
        "metrics": {
            "accuracy": NUM_RIGHT[name] / 100,
            "num_tuned_parameters": {"base": 0, "expert": 384, "lora": 320, "classifier": 1539}[name],
            "right_domain_share": 0.75 if has_first_pass else None,
            "first_pass_ms": 2.0 if has_first_pass else None,
            "second_pass_ms": 4.0,
        },
        "samples": {
            "is_correct": is_correct,
            "answer_log_probability_nats": [math.log(0.5) if right else -50.0 for right in is_correct],
        },
    }
    return Point(
        run_id=f"run-transformer_squared-{seed}",
        arch="transformer_squared",
        size="tiny",
        seed=seed,
        task="adaptation",
        **{**values, **changes},  # type: ignore[arg-type]
    )


def results_of(
    builder: ModuleType, folder: Path, points: list[Point], seeds: tuple[int, ...] = (0,)
) -> Results:
    builder.write_experiment(folder, archs=ARCHS, seeds=seeds)
    for point in points:
        append(folder / "records" / f"transformer_squared-tiny-seed{point.seed}.jsonl", point)
    return load([folder])


def texts(table: Table | None) -> list[list[str]]:
    assert table is not None
    return [[cell.text for cell in row] for row in table.rows]


def test_gains_are_over_the_base_and_over_lora(builder: ModuleType, tmp_path: Path) -> None:
    points = [adaptation_point(name) for name in ("classifier", "lora", "expert", "base")]
    table = adaptation_table(results_of(builder, tmp_path, points))
    assert [column.title for column in table.columns].count("Gain over LoRA") == 2
    start = ["Transformer²", "torch"]
    gained = ["40.0%", "+20.00", "+5.00", "20.0%", "+10.00", "+2.50"]
    less = ["35.0%", "+15.00", "–", "17.5%", "+7.50", "–"]
    assert texts(table) == [
        [*start, "base", "20.0%", "–", "-15.00", "10.0%", "–", "-7.50", "0", "–", "–", "4.00"],
        [*start, "expert of the domain", *gained, "384", "–", "–", "4.00"],
        [*start, "LoRA of the domain", *less, "320", "–", "–", "4.00"],
        [*start, "dispatch: classifier", *gained, "1,539", "75%", "2.00", "4.00"],
    ]


def test_the_caption_says_what_the_numbers_cannot(builder: ModuleType, tmp_path: Path) -> None:
    """The base's time is that of the factored form, and the question was never trained on."""
    caption = adaptation_table(results_of(builder, tmp_path, [adaptation_point("base")])).caption
    assert "plain base’s times stand in the latency table" in caption
    assert "past the trained length" in caption


def test_intervals_are_paired_and_hold_the_gain(builder: ModuleType, tmp_path: Path) -> None:
    points = [adaptation_point(name) for name in ("expert", "lora", "base")]
    (_, expert, _) = adaptation_table(results_of(builder, tmp_path, points)).rows
    assert expert[3].note == "[30.9%, 49.8%] of 100"
    for cell, gain in ((expert[4], 20.0), (expert[5], 5.0), (expert[7], 10.0)):
        low, high = map(float, re.findall(r"[+-]\d+\.\d+", cell.note))
        assert low < gain < high < low + 20
    assert float(expert[5].note[1:6]) > 0, "five more of 100 and none fewer: paired, that is a gain"


def test_seeds_are_pooled_prompt_by_prompt(builder: ModuleType, tmp_path: Path) -> None:
    points = [adaptation_point(name, seed) for seed in (0, 1) for name in ("base", "expert")]
    points.pop(0)  # the base of seed 0 is missing: its expert has nothing to be compared with
    rows = adaptation_table(results_of(builder, tmp_path, points, seeds=(0, 1))).rows
    assert rows[0][3].note.endswith("of 100") and rows[1][3].note.endswith("of 200")
    assert rows[1][4].text == "+20.00" and rows[1][5].text == "–", "no LoRA was measured"


def test_prompts_without_a_number_leave_as_pairs(builder: ModuleType, tmp_path: Path) -> None:
    """Right at the same 40 prompts: a gain of none, whichever prompt either lacks."""
    points = [adaptation_point("expert"), adaptation_point("expert")]
    points[1].cell["adaptation"] = "base"
    for point, index in zip(points, (10, 90), strict=True):
        for values in point.samples.values():
            values[index] = None
    base, expert = adaptation_table(results_of(builder, tmp_path, points)).rows
    assert expert[3].note.endswith("of 99") and base[3].note.endswith("of 99")
    for column in (4, 7):
        assert (expert[column].text, expert[column].note) == ("+0.00", "[+0.00, +0.00]")


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_the_caption_says_how_several_seeds_enter(
    builder: ModuleType, tmp_path: Path, seeds: tuple[int, ...]
) -> None:
    points = [adaptation_point(name, seed) for seed in seeds for name in ("base", "expert")]
    caption = adaptation_table(results_of(builder, tmp_path, points, seeds=seeds)).caption
    assert ("intervals allow for the differences between models of different seeds" in caption) == (
        len(seeds) > 1
    )


def test_the_caption_says_where_lora_stands(builder: ModuleType, tmp_path: Path) -> None:
    placement = "LoRA of rank 1 on 1 of 6 feed-forward matrices, 320 parameters"

    def placed(point: Point) -> Point:
        if point.task == "train" and point.arch == "transformer_squared":
            point.details["lora_placement"] = placement
        return point

    builder.write_experiment(tmp_path, archs=ARCHS, change=placed)
    append(tmp_path / "records" / "transformer_squared-tiny-seed0.jsonl", adaptation_point("base"))
    assert f" {placement}." in adaptation_table(load([tmp_path])).caption


def test_a_failed_cell_says_so(builder: ModuleType, tmp_path: Path) -> None:
    failed = adaptation_point("expert", status="oom", reason="too big", metrics={}, samples={})
    rows = texts(adaptation_table(results_of(builder, tmp_path, [adaptation_point("base"), failed])))
    assert rows[1][3:] == ["out of memory", "–", "–", "out of memory", *["–"] * 6]


def test_what_was_tuned_and_found_is_shown(builder: ModuleType, tmp_path: Path) -> None:
    def tuned(point: Point) -> Point:
        if point.task == "train" and point.arch == "transformer_squared":
            point.details.update(
                experts={"torch": {}},
                expert_method="fine_tuning",
                lora_method="reinforce",
                lora_placement="LoRA of rank 1",
                few_shot={"torch": {"mixture": {"torch": 0.5, "needle": 0.25}, "seconds": 1.5}},
            )
            point.metrics.update(num_expert_parameters=384, num_lora_parameters=320, expert_train_seconds=7.0)
        return point

    results = load([builder.write_experiment(tmp_path, archs=ARCHS, change=tuned)])
    assert texts(tuning_table(results)) == [
        ["Transformer²", "0", "experts", "fine-tuning", "384", "7.00", ""],
        ["Transformer²", "0", "LoRA", "reinforce", "320", "–", "LoRA of rank 1"],
    ]
    assert texts(mixtures_table(results)) == [
        ["Transformer²", "0", "torch", "torch 0.50, needle 0.25", "1.50"]
    ]


def test_the_page_has_a_section_where_there_are_experts(builder: ModuleType, tmp_path: Path) -> None:
    def cost_alone(point: Point) -> Point | None:
        return point if point.task == "cost" else None

    folder = builder.write_experiment(tmp_path / "a", archs=ARCHS, change=cost_alone)
    for name in NUM_RIGHT:
        append(folder / "records" / "transformer_squared-tiny-seed0.jsonl", adaptation_point(name))
    text = render([folder], tmp_path / "page").read_text()
    assert "Adaptation to a domain" in text and "expert of the domain" in text
    assert "were not measured" not in text
    other = load([builder.write_experiment(tmp_path / "b", archs=("mamba",))])
    assert not has_experts(other) and adaptation_table(other) is None


def test_records_from_before_there_were_gains_say_that_none_was_measured() -> None:
    """Those published have experts, or else gains."""
    results = load([PUBLISHED])
    assert has_experts(results)
    if not results.of("adaptation"):
        prepared = section(results)
        assert prepared is not None and prepared.notes == [
            "Gains over the base and over LoRA were not measured in these records."
        ]
        assert all(row[4] == "–" for row in texts(tuning_table(results)))


def test_a_table_needs_measurements(builder: ModuleType, tmp_path: Path) -> None:
    results = load([builder.write_experiment(tmp_path, archs=("mamba",))])
    assert tuning_table(results) is None and mixtures_table(results) is None


@pytest.mark.parametrize("name", ["prompt", "somebody's own"])
def test_an_adaptation_without_a_name_here_keeps_its_own(
    builder: ModuleType, tmp_path: Path, name: str
) -> None:
    point = adaptation_point("expert", cell={"domain": "torch", "adaptation": name})
    rows = texts(adaptation_table(results_of(builder, tmp_path, [adaptation_point("base"), point])))
    assert rows[1][2] == ("dispatch: prompt" if name == "prompt" else name)
