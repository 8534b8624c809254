"""The two experiments on Titans run, small: the ablation, and the long documents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.config.build import resolve
from harness.config.compose import compose_config

Command = Callable[..., Any]
Points = Callable[..., list[Any]]


def test_the_ablation_runs_its_variants_under_their_own_names(
    quick_command: Command, tiny: list[str], tiny_tasks: list[str], points: Points, tmp_path: Path
) -> None:
    names = ["titans_lmm_no_momentum", "titans_mac_no_persistent"]
    chosen = ",".join(f"titans_ablation/{name.removeprefix('titans_')}" for name in names)
    tasks = [o for o in tiny_tasks if "needle" not in o]
    own = ["task=[perplexity,latency]", f"archs=[{chosen}]", f"output={tmp_path}"]
    code, _, err = quick_command("experiment=titans_ablation", *tiny, *tasks, *own)
    assert code == 0, err
    assert {p.status for p in points(tmp_path)} == {"ok"}
    for task in ("train", "perplexity", "latency"):
        assert sorted({p.arch for p in points(tmp_path, task=task)}) == names, task


def test_the_long_experiment_reads_16384_tokens_and_no_latency() -> None:
    config = resolve(compose_config(["experiment=titans_long"]))
    assert list(config["tasks"]) == ["perplexity"] and config["archs"] == ["titans_lmm", "titans_mac"]
    assert config["tasks"]["perplexity"]["context_lengths_tokens"][-1] == 16384
    assert config["train"] == resolve(compose_config([]))["train"], "trained by default"


def test_the_long_experiment_records_the_loss_by_position(
    quick_command: Command, tiny: list[str], points: Points, tmp_path: Path
) -> None:
    own = ["tasks.perplexity.context_lengths_tokens=[1024]", "tasks.perplexity.num_documents=1"]
    code, _, err = quick_command("experiment=titans_long", *tiny, *own, f"output={tmp_path}")
    assert code == 0, err
    found = points(tmp_path, task="perplexity")
    assert [p.arch for p in found] == ["titans_lmm", "titans_mac"]
    for point in found:
        assert point.status == "ok"
        assert point.samples["bucket_end_tokens"][-1] == 1024
        assert all(0 < loss < 20 for loss in point.samples["bucket_loss_nats"])
