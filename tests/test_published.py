"""What the project publishes: the records under reports/published hold what the README says of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from harness.config.compose import compose_config
from harness.record.schema import Header, Point, read
from reports.results.load import Results, load
from tests.conftest import compose_resolved

PUBLISHED = Path(__file__).resolve().parent.parent / "reports" / "published" / "cpu_small"
CONFIG = compose_config(["experiment=cpu_small"])
ARCHITECTURES = list(CONFIG["archs"])
#: "90% or more on the needle at trained lengths", for what has a short convolution.
RECALL = 0.9


@pytest.fixture(scope="module")
def results() -> Results:
    return load([PUBLISHED])


def test_every_architecture_is_published_and_none_failed(results: Results) -> None:
    assert {series.arch for series in results.series} == set(ARCHITECTURES)
    assert {point.task for point in results.failures()} <= {"learning_rate_search"}
    assert results.damaged_lines == [] and results.left_out == {}
    for task in ("train", "cost", "perplexity", "needle", "latency"):
        assert {point.arch for point in results.ok(task)} == set(ARCHITECTURES), task


@pytest.mark.parametrize("arch", [a for a in ARCHITECTURES if a != "transformer_squared"])
def test_the_learning_rate_is_the_published_searchs_best(arch: str, results: Results) -> None:
    searched = [point for point in results.of("learning_rate_search") if point.arch == arch]
    assert sorted(p.cell["learning_rate"] for p in searched) == sorted(CONFIG["train"]["search_grid"])
    finished = {p.cell["learning_rate"]: p.metrics["mixture_loss_nats"] for p in searched if p.status == "ok"}
    best = min(finished, key=lambda rate: finished[rate])
    assert compose_resolved(f"arch={arch}")["arch"]["learning_rate"] == best
    (train,) = (point for point in results.ok("train") if point.arch == arch)
    assert train.metrics["learning_rate"] == best


def test_short_convolutions_recall_at_trained_lengths(results: Results) -> None:
    has_one = {a: compose_resolved(f"arch={a}")["arch"]["has_short_convolution"] for a in ARCHITECTURES}
    found: dict[tuple[str, int], list[Point]] = {}
    for point in results.ok("needle"):
        if has_one[point.arch] and point.metrics["is_trained_length"]:
            found.setdefault((point.arch, point.cell["context_tokens"]), []).append(point)
    assert len(found) >= 10 and set(found) == {(arch, 128) for arch in ARCHITECTURES if has_one[arch]}
    assert {len(points) for points in found.values()} == {5}
    means = {key: sum(point.metrics["accuracy"] for point in points) / 5 for key, points in found.items()}
    assert {key: mean for key, mean in means.items() if mean < RECALL} == {}


@pytest.mark.parametrize("folder", ["cpu_small", "titans_long"])
def test_published_models_were_trained_as_the_configuration_says(folder: str) -> None:
    paths = sorted((PUBLISHED.parent / folder / "records").glob("*.jsonl"))
    headers = [record for path in paths for record in read(path) if isinstance(record, Header)]
    assert headers
    config = compose_resolved(f"experiment={folder}", "arch=transformer")
    train, size = config["train"], config["size"]
    for header in headers:
        published = header.config
        for key in ("num_steps", "warmup_fraction", "final_ratio"):
            assert published["train"][key] == train[key], (header.job, key)
        streams = [
            {k: v for k, v in c["stream"].items() if k != "_target_"} for c in (published["train"], train)
        ]
        assert streams[0] == streams[1], (header.job, "stream")  # the class may have moved since
        for key in ("d_model", "num_layers", "window_tokens"):
            assert published["size"][key] == size[key], (header.job, key)


def test_titans_over_long_documents_are_what_the_text_says() -> None:
    points = load([PUBLISHED.parent / "titans_long"]).ok("perplexity")
    text = " ".join((PUBLISHED.parent / "README.md").read_text(encoding="utf-8").split())
    for arch, name in (("titans_lmm", "LMM"), ("titans_mac", "MAC")):
        bits = {p.cell["context_tokens"]: p.metrics["bits_per_byte"] for p in points if p.arch == arch}
        assert sorted(bits) == [128, 1024, 4096, 16384]
        assert f"{name} " + ", ".join(f"{bits[length]:.2f}" for length in sorted(bits)) in text


def test_nothing_published_names_a_place_on_a_machine() -> None:
    for path in PUBLISHED.parent.rglob("*"):
        if path.suffix in (".jsonl", ".html"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"(?<![\w.:/])/(?:root|home|tmp|work|mnt|opt|usr|Users)/", text), path


def test_what_is_published_stays_small() -> None:
    assert sum(path.stat().st_size for path in PUBLISHED.parent.rglob("*") if path.is_file()) < 7e6
