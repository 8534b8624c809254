"""The ranking, on the page and in the terminal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from harness.record.metrics import Metric
from harness.record.schema import Point, append
from reports.page.terminal import ranking_text
from reports.results.load import load
from reports.results.ranking import make_ranking
from reports.sections.ranking import ranking_table
from reports.sections.summary import findings

ARCHS = ("transformer", "mamba", "hybrid")


def names(folder: Path) -> list[str]:
    return [row.series.arch for row in make_ranking(load([folder])).rows]


def test_bits_per_byte_at_the_longest_context_decides(builder: ModuleType, tmp_path: Path) -> None:
    builder.write_experiment(tmp_path, archs=ARCHS)
    ranking = make_ranking(load([tmp_path]))
    by_bits = sorted(ARCHS, key=lambda arch: builder.bits_per_byte(arch, 4096))
    assert [row.series.arch for row in ranking.rows] == by_bits == ["mamba", "hybrid", "transformer"]
    assert ranking.cells.context_tokens == 4096
    assert [row.number("behind") is None for row in ranking.rows] == [True, False, False]
    assert ranking.rows[1].number("behind") > 0


def test_models_are_paired_on_the_same_data_alone(builder: ModuleType, tmp_path: Path) -> None:
    builder.write_experiment(tmp_path, archs=("mamba", "hybrid"))
    builder.write_experiment(tmp_path, archs=("transformer",), tag="b", data_hash="other documents")
    rows = {row.series.arch: row for row in make_ranking(load([tmp_path])).rows}
    assert rows["hybrid"].number("behind") is not None
    assert rows["transformer"].number("bits_per_byte") is not None
    assert rows["transformer"].number("behind") is None


def test_seeds_that_agree_do_not_narrow_a_difference(builder: ModuleType, tmp_path: Path) -> None:
    def same(point: Point) -> Point:
        return (
            replace(
                builder.perplexity_point(point.arch, point.cell["context_tokens"], run_id=point.run_id),
                seed=point.seed,
            )
            if point.task == "perplexity"
            else point
        )

    found = []
    for folder, seeds in (("once", (0,)), ("five", (0, 1, 2, 3, 4))):
        builder.write_experiment(tmp_path / folder, archs=ARCHS, seeds=seeds, change=same)
        found.append([row.values["behind"] for row in make_ranking(load([tmp_path / folder])).rows[1:]])
    for once, five in zip(*found, strict=True):
        assert once.low < once.value < once.high
        assert (five.value, five.low, five.high) == pytest.approx((once.value, once.low, once.high))


def test_one_document_tells_no_two_models_apart(builder: ModuleType, tmp_path: Path) -> None:
    def shorten(point: Point) -> Point:
        samples = {name: values[:1] for name, values in point.samples.items()}
        return replace(point, samples=samples) if point.task == "perplexity" else point

    builder.write_experiment(tmp_path, archs=ARCHS, change=shorten)
    results = load([tmp_path])
    ranking = make_ranking(results)
    for row in ranking.rows[1:]:
        behind = row.values["behind"]
        assert behind.value is not None and behind.value > 0 and behind.low is None and behind.high is None
    assert "cannot be told apart" in dict(findings(results, ranking))["Fewest bits per byte"]
    assert ranking_table(ranking).rows[1][4].note == ""


def test_who_failed_there_comes_last_and_is_named(builder: ModuleType, tmp_path: Path) -> None:
    def change(point: Point) -> Point:
        is_hit = point.task == "perplexity" and point.arch == "mamba" and point.cell["context_tokens"] == 4096
        return builder.failed(point, "oom", "no room") if is_hit else point

    builder.write_experiment(tmp_path, archs=ARCHS, change=change)
    ranking = make_ranking(load([tmp_path]))
    assert [row.series.arch for row in ranking.rows] == ["hybrid", "transformer", "mamba"]
    assert ranking.cells.context_tokens == 4096
    cells = ranking_table(ranking).rows[-1]
    assert cells[0].text == "–" and cells[3].text == "out of memory"


def test_times_are_read_at_the_longest_context_that_all_have(builder: ModuleType, tmp_path: Path) -> None:
    def change(point: Point) -> Point:
        cell = point.cell
        is_hit = point.task == "latency" and point.arch == "hybrid" and cell["context_tokens"] > 1024
        return builder.failed(point, "timeout", "slow") if is_hit and cell["phase"] == "decode" else point

    builder.write_experiment(tmp_path, archs=ARCHS, change=change)
    ranking = make_ranking(load([tmp_path]))
    assert ranking.cells.phase_context_tokens == {"prefill": 4096, "decode": 1024}
    assert ranking.cells.batch_size == 1
    for row in ranking.rows:
        expected = {
            point.cell["phase"]: point.metrics["median_ms"]
            for point in builder.latency_points(row.series.arch, run_id="x")
            if point.cell["batch_size"] == 1
            and point.cell["context_tokens"] == ranking.cells.phase_context_tokens[point.cell["phase"]]
        }
        assert (row.number("prefill_ms"), row.number("decode_ms")) == pytest.approx(
            (expected["prefill"], expected["decode"])
        )
        assert row.number("state_bytes") == builder.state_bytes(row.series.arch, 1024)


def test_needles_are_split_at_the_trained_lengths(builder: ModuleType, tmp_path: Path) -> None:
    builder.write_experiment(tmp_path, archs=ARCHS)
    for row in make_ranking(load([tmp_path])).rows:
        trained, beyond = row.values["needle_trained"], row.values["needle_beyond"]
        assert (trained.num_cells, beyond.num_cells) == (10, 15)
        assert trained.value is not None and beyond.value is not None and trained.value > beyond.value


def test_the_best_of_each_column_is_marked_but_no_incomplete_accuracy(
    builder: ModuleType, tmp_path: Path
) -> None:
    def change(point: Point) -> Point:
        is_hit = point.task == "needle" and point.arch == "mamba" and point.cell["context_tokens"] == 4096
        return builder.failed(point, "oom", "no room") if is_hit else point

    builder.write_experiment(tmp_path, archs=ARCHS, change=change)
    table = ranking_table(make_ranking(load([tmp_path])))
    best = {row[1].text: [cell.is_best for cell in row] for row in table.rows}
    beyond = {row[1].text: row[6] for row in table.rows}
    assert best["Mamba"][3] and not best["Hybrid"][3]
    assert beyond["Mamba"].note.endswith("10 of 15 cells")
    assert not beyond["Mamba"].is_best and beyond["Hybrid"].is_best
    assert best["Mamba"][9] and not best["Transformer"][9]


def test_without_latency_the_predicted_state_is_shown_as_such(builder: ModuleType, tmp_path: Path) -> None:
    builder.write_experiment(
        tmp_path, archs=ARCHS, change=lambda point: None if point.task == "latency" else point
    )
    ranking = make_ranking(load([tmp_path]))
    assert not ranking.cells.is_state_measured and ranking.cells.state_context_tokens == 4096
    assert {row.series.arch: row.number("state_bytes") for row in ranking.rows} == {
        arch: builder.state_bytes(arch, 4096) for arch in ARCHS
    }
    assert "predicted at 4,096 tokens" in [column.unit for column in ranking_table(ranking).columns]


def test_the_terminal_shows_the_same_order_within_its_width(builder: ModuleType, tmp_path: Path) -> None:
    def change(point: Point) -> Point:
        is_hit = point.task in ("train", "perplexity", "needle") and point.arch == "titans_mal"
        return builder.failed(point, "diverged", "not finite") if is_hit else point

    builder.write_experiment(tmp_path, change=change)
    text = ranking_text(tmp_path)
    lines = text.splitlines()
    labels = [row.series.label for row in make_ranking(load([tmp_path])).rows]
    assert max(len(line) for line in lines) <= 100
    assert len(lines) == 2 + 13 + 2
    for label, line in zip(labels, lines[2:], strict=False):
        assert label in line
    assert "diverged" in lines[14] and "31 cells" in lines[-1]


def test_a_long_name_is_cut_and_not_the_numbers(builder: ModuleType, tmp_path: Path) -> None:
    config = {"arch": {"name": "mamba", "display_name": "M" * 120, "colour": "#123456"}}
    builder.write_experiment(tmp_path, archs=("mamba",), config=config)
    line = ranking_text(tmp_path).splitlines()[2]
    assert len(line) <= 100 and "…" in line and line.endswith("KiB")


def test_one_architecture_with_training_alone_is_a_ranking(builder: ModuleType, tmp_path: Path) -> None:
    builder.write_experiment(
        tmp_path, archs=("mamba",), change=lambda point: point if point.task == "train" else None
    )
    assert names(tmp_path) == ["mamba"]
    assert "Mamba" in ranking_text(tmp_path)


def test_points_of_another_seed_do_not_change_the_order_silently(builder: ModuleType, tmp_path: Path) -> None:
    def change(point: Point) -> Point:
        if point.task == "perplexity" and point.seed == 1 and point.arch == "mamba":
            return replace(point, metrics={**point.metrics, "bits_per_byte": 9.0})
        return point

    builder.write_experiment(tmp_path, archs=ARCHS, seeds=(0, 1), change=change)
    last = make_ranking(load([tmp_path])).rows[-1]
    deviation = last.values["bits_per_byte"].sd
    assert last.series.arch == "mamba" and deviation is not None and deviation > 4


def test_nobody_is_the_best_at_what_nobody_can(builder: ModuleType, tmp_path: Path) -> None:
    def change(point: Point) -> Point:
        if point.task != "needle" or point.metrics["is_trained_length"]:
            return point
        return replace(
            point,
            metrics={**point.metrics, "accuracy": 0.0},
            samples={**point.samples, "is_correct": [0] * 20},
        )

    for folder, changed, expected in (
        ("some", lambda point: point, "Mamba, "),
        ("none", change, "none recalls any."),
    ):
        builder.write_experiment(tmp_path / folder, archs=ARCHS, change=changed)
        results = load([tmp_path / folder])
        assert dict(findings(results, make_ranking(results)))["Needle, beyond"].startswith(expected)


def test_a_task_of_a_plug_in_has_a_column_where_architectures_compare(
    builder: ModuleType, tmp_path: Path
) -> None:
    recall = Metric(
        name="recall", label="recall", unit="share", direction="higher", kind="quality", is_headline=True
    )
    folder = builder.write_experiment(tmp_path, archs=ARCHS, metrics={"binding": (recall,)})
    for arch, values in (("mamba", (0.5, 1.0)), ("hybrid", (0.5, 0.6)), ("transformer", (0.99, None))):
        for num_pairs, value in enumerate(values):
            point = builder.point(
                arch,
                "binding",
                {"num_pairs": num_pairs},
                run_id=f"run-{arch}-0",
                **({"metrics": {"recall": value}} if value else {"status": "oom", "reason": "too large"}),
            )
            append(folder / "records" / f"{arch}-tiny-seed0.jsonl", point)
    table = ranking_table(make_ranking(load([folder])))
    assert (table.columns[-1].title, table.columns[-1].unit) == ("Binding", "recall, mean over cells")
    found = {row[1].text: (row[-1].text, row[-1].note, row[-1].is_best) for row in table.rows}
    assert found == {
        "Mamba": ("75%", "", True),
        "Hybrid": ("55%", "", False),
        "Transformer": ("99%", "1 of 2 cells", False),
    }
    assert "Binding" not in ranking_text(folder)
