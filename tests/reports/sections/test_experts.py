"""What the report says of experts, of the hint they are given, and of skipped training steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

from harness.record.schema import Point
from reports.page.html import render
from reports.results.load import load
from reports.sections.training.experts import HINT, experts_table
from reports.sections.training.training import training_table

ARCHS = ("mamba", "transformer_squared")


def change(point: Point) -> Point | None:
    """Two experts of Transformer², one of which did not learn, and three skipped steps of Mamba."""
    if point.task == "train" and point.arch == "transformer_squared":
        learned = {"reward_before": -0.5, "reward_after": 0.25, "best_step": 20}
        kept = {"reward_before": 0.125, "reward_after": 0.125, "best_step": 0}
        details = {"experts": {"stdlib": learned, "torch": kept}, "classifier_accuracy": 0.97}
        return replace(point, details={**point.details, **details})
    if point.task == "train":
        return replace(point, metrics={**point.metrics, "num_skipped_steps": 3})
    return point if point.task == "perplexity" else None


def test_every_expert_has_a_row(builder: ModuleType, tmp_path: Path) -> None:
    table = experts_table(load([builder.write_experiment(tmp_path, archs=ARCHS, change=change)]))
    assert table is not None and HINT in table.caption
    rows = [[cell.text for cell in row] for row in table.rows]
    assert rows == [
        ["Transformer²", "0", "stdlib", "-0.500", "0.250", "+0.750", "20", "97%"],
        ["Transformer²", "0", "torch", "0.125", "0.125", "+0.000", "0", "97%"],
    ]
    assert [row[6].note for row in table.rows] == ["", "the base is kept"]


def test_what_an_expert_lacks_is_a_dash(builder: ModuleType, tmp_path: Path) -> None:
    def damage(point: Point) -> Point:
        return replace(point, details={**point.details, "experts": {"torch": None}})

    table = experts_table(load([builder.write_experiment(tmp_path, archs=("mamba",), change=damage)]))
    assert table is not None and [cell.text for cell in table.rows[0][3:]] == ["–"] * 5


def test_the_page_says_that_perplexity_was_given_a_hint(builder: ModuleType, tmp_path: Path) -> None:
    both = render([builder.write_experiment(tmp_path / "a", archs=ARCHS, change=change)], tmp_path / "x")
    assert both.read_text().count(HINT) == 2, "beside the perplexities, and beside the experts"
    other = render(
        [builder.write_experiment(tmp_path / "b", archs=("mamba",), change=change)], tmp_path / "y"
    )
    assert HINT not in other.read_text()


def test_skipped_steps_have_a_column_where_there_were_any(builder: ModuleType, tmp_path: Path) -> None:
    table = training_table(load([builder.write_experiment(tmp_path / "a", archs=ARCHS, change=change)]))
    (index,) = [i for i, column in enumerate(table.columns) if column.title == "Skipped"]
    assert [row[index].text for row in table.rows] == ["3", "–"] and "not finite" in table.caption
    table = training_table(load([builder.write_experiment(tmp_path / "b", archs=ARCHS)]))
    assert "Skipped" not in [column.title for column in table.columns]
