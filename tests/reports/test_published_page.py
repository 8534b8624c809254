"""What the published page shows, against its records as they stand in their files."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from reports.draw.plot import Plot
from reports.page.html import render
from reports.results.load import load
from reports.sections import prepare
from tests.reports.parsed_page import Page

PUBLISHED = Path(__file__).resolve().parent.parent.parent / "reports" / "published" / "cpu_small"
BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
COUNTS = {"k": 1e3, "M": 1e6}


def lines() -> list[dict[str, Any]]:
    paths = sorted((PUBLISHED / "records").glob("*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


RECORDS = lines()
#: Architecture -> its name on the page.
NAMES = {
    record["config"]["arch"]["name"]: record["config"]["arch"]["display_name"]
    for record in RECORDS
    if record["kind"] == "header" and record["config"].get("arch")
}


def metrics(arch: str, task: str, **cell: Any) -> list[dict[str, Any]]:
    """Return the metrics of every measured cell that has these coordinates."""
    found = [
        record["metrics"]
        for record in RECORDS
        if (record["kind"], record.get("arch"), record.get("task")) == ("point", arch, task)
        and record["status"] == "ok"
        and cell.items() <= record["cell"].items()
    ]
    assert found, (arch, task, cell)
    return found


def metric(arch: str, task: str, name: str, **cell: Any) -> float:
    """Return the one number of a cell."""
    (one,) = metrics(arch, task, **cell)
    return one[name]


def number(text: str) -> float:
    """Return the number that a cell begins with, in bytes, parts of one or plain."""
    first, _, rest = text.replace("[", " ").strip().partition(" ")
    value = float(first.rstrip("%").replace(",", ""))
    if first.endswith("%"):
        return value / 100
    unit = rest.split()[0] if rest.split() else ""
    return value * (BYTES | COUNTS).get(unit, 1)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(render([PUBLISHED], tmp_path_factory.mktemp("page")).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def plots() -> dict[str, Plot]:
    return {plot.name: plot for section in prepare(load([PUBLISHED])) for plot in section.figures}


def rows(page: Page, table: str, names_in: int = 0) -> dict[str, dict[str, str]]:
    """Return architecture -> column title -> text, for tables with one row per architecture."""
    head, *body = page.tables[table]
    return {
        row[names_in].strip(): {title.strip(): cell for title, cell in zip(head, row, strict=True)}
        for row in body
    }


def column(row: dict[str, str], start: str) -> str:
    (text,) = (text for title, text in row.items() if title.startswith(start))
    return text


@pytest.mark.parametrize("arch", NAMES)
def test_the_ranking_shows_the_recorded_values(arch: str, page: Page) -> None:
    row = rows(page, "ranking", names_in=1)[NAMES[arch]]
    latency = {"context_tokens": 16384, "batch_size": 1}
    expected = {
        "Parameters": metric(arch, "cost", "num_parameters"),
        "Bits per byte": metric(arch, "perplexity", "bits_per_byte", context_tokens=4096),
        "Prefill": metric(arch, "latency", "median_ms", phase="prefill", **latency),
        "Decode": metric(arch, "latency", "median_ms", phase="decode", **latency),
        "State": metric(arch, "latency", "state_bytes", phase="decode", **latency),
        "Training": metric(arch, "train", "tokens_per_s"),
    }
    found = {start: number(column(row, start)) for start in expected}
    assert found == pytest.approx(expected, rel=0.005)
    for is_trained, start in ((1, "Needle, trained"), (0, "Needle, beyond")):
        cells = [one for one in metrics(arch, "needle") if one["is_trained_length"] == is_trained]
        assert {one["num_examples"] for one in cells} == {20}
        accuracy = mean(one["accuracy"] for one in cells)
        assert number(column(row, start)) == pytest.approx(accuracy, abs=0.0051)


def test_the_ranking_is_in_the_order_of_the_loss(page: Page) -> None:
    by_loss = sorted(NAMES, key=lambda arch: metric(arch, "perplexity", "bits_per_byte", context_tokens=4096))
    assert [row[1].strip() for row in page.tables["ranking"][1:]] == [NAMES[arch] for arch in by_loss]
    losses = [metric(arch, "perplexity", "bits_per_byte", context_tokens=4096) for arch in by_loss]
    behind = [row[4].split()[0] for row in page.tables["ranking"][1:]]
    assert behind == ["–", *(f"{loss - losses[0]:+.3f}" for loss in losses[1:])]


def test_every_loss_stands_with_its_interval_and_perplexity(page: Page) -> None:
    one = metrics("mamba", "perplexity", context_tokens=1024)[0]
    interval = f"[{one['bits_per_byte_low']:.3f}, {one['bits_per_byte_high']:.3f}]"
    text = column(rows(page, "perplexity")["Mamba"], "1,024").split()
    assert " ".join(text[:3]) == f"{one['bits_per_byte']:.3f} {interval}"
    assert text[3] == "ppl" and float(text[4]) == pytest.approx(one["perplexity"], rel=0.005)


def test_every_recall_stands_with_the_certainty_of_the_answer(page: Page) -> None:
    cells = metrics("titans_mac", "needle", context_tokens=2048)
    text = column(rows(page, "needle")["Titans MAC"], "2,048")
    assert number(text) == pytest.approx(mean(one["accuracy"] for one in cells), abs=0.0051)
    nats = mean(one["answer_log_probability_nats"] for one in cells)
    assert float(text.split()[-1]) == pytest.approx(nats, abs=0.0051)


def test_every_latency_stands_with_its_percentiles(page: Page) -> None:
    cell = {"phase": "prefill", "context_tokens": 16384, "batch_size": 1}
    (one,) = metrics("ttt_linear", "latency", **cell)
    (row,) = (
        r
        for r in page.tables["latency"]
        if [c.strip() for c in r[:4]] == ["prefill", "16,384", "1", "TTT-Linear"]
    )
    median, low, high = (float(part.strip("[], ")) for part in row[4].replace(",", "").split())
    assert (median, low, high) == pytest.approx((one["median_ms"], one["p10_ms"], one["p90_ms"]), rel=0.005)
    assert number(row[5]) == pytest.approx(one["tokens_per_s"], rel=0.005)
    assert number(row[6]) == pytest.approx(one["peak_memory_bytes"], rel=0.005)


def test_training_and_search_are_those_recorded(page: Page) -> None:
    (one,) = metrics("hybrid", "train")
    row = rows(page, "training")["Hybrid"]
    assert number(column(row, "Trained")) == one["trained_tokens"]
    assert float(column(row, "Validation")) == pytest.approx(one["final_validation_bits_per_byte"], abs=5e-4)
    searched = {
        record["cell"]["learning_rate"]: record["metrics"]["mixture_loss_nats"]
        for record in RECORDS
        if record.get("task") == "learning_rate_search" and record["arch"] == "hybrid"
    }
    (shown,) = (row for row in page.tables["learning_rates"] if row[0].strip() == "Hybrid")
    assert [float(text) for text in shown[1:-1]] == pytest.approx(list(searched.values()), abs=5e-4)
    assert float(shown[-1]) == one["learning_rate"] == min(searched, key=lambda rate: searched[rate])


def test_adaptation_shows_the_share_of_right_answers(page: Page) -> None:
    points = [record for record in RECORDS if record.get("task") == "adaptation"]
    assert points
    for point in points:
        domain, adaptation = point["cell"]["domain"], point["cell"]["adaptation"]
        if adaptation != "lora":
            continue
        (row,) = (
            r for r in page.tables["adaptation"] if r[1].strip() == domain and r[2].startswith("LoRA of")
        )
        assert number(row[3]) == pytest.approx(point["metrics"]["accuracy"], abs=5e-4)


def test_curves_of_the_loss_are_those_recorded(plots: dict[str, Plot]) -> None:
    curves = {curve.series.arch: curve for curve in plots["bits_per_byte_by_context"].curves}
    assert set(curves) == set(NAMES)
    for arch, curve in curves.items():
        cells = {
            context: metrics(arch, "perplexity", context_tokens=context)[0] for context in (128, 1024, 4096)
        }
        place = {x: index for index, x in enumerate(curve.x)}
        for context, one in cells.items():
            index = place[context]
            assert curve.low is not None and curve.high is not None
            assert (curve.y[index], curve.low[index], curve.high[index]) == (
                one["bits_per_byte"],
                one["bits_per_byte_low"],
                one["bits_per_byte_high"],
            )


def test_curves_of_decode_are_those_recorded_and_their_crossings_lie_between(plots: dict[str, Plot]) -> None:
    plot = plots["decode_batch1"]
    curves = {curve.series.arch: curve for curve in plot.curves}
    for arch, curve in curves.items():
        assert len(curve.x) >= 3
        assert curve.y == [
            metric(arch, "latency", "median_ms", phase="decode", batch_size=1, context_tokens=context)
            for context in curve.x
        ]
    assert plot.circled
    reference = dict(zip(curves["transformer"].x, curves["transformer"].y, strict=True))
    for circled in plot.circled:
        own = dict(zip(curves[circled.series.arch].x, curves[circled.series.arch].y, strict=True))
        for x, y in zip(circled.x, circled.y, strict=True):
            before, after = max(c for c in own if c <= x), min(c for c in own if c >= x)
            assert (own[before] - reference[before]) * (own[after] - reference[after]) <= 0
            assert min(own[before], own[after]) <= y <= max(own[before], own[after])
