"""Hydra from end to end: sweeps, help, experiments and searches as Hydra's users expect them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from harness.record.schema import Point
from harness.train.adapted_model import ADAPTED_METRICS
from harness.train.trained_model import SEARCH_METRICS, TRAIN_METRICS

Command = Callable[..., tuple[int, str, str]]
Points = Callable[..., list[Point]]


def test_a_sweep_of_the_users_own(
    quick_command: Command, tiny: list[str], points: Points, tmp_path: Path
) -> None:
    arguments = ["-m", "arch=transformer,recurrent", "seed=0,1", *tiny, "task=[]", f"output={tmp_path}"]
    code, out, err = quick_command(*arguments)
    assert code == 0, err
    trained = {(p.arch, p.seed) for p in points(tmp_path, task="train", status="ok")}
    assert trained == {(arch, seed) for arch in ("transformer", "recurrent") for seed in (0, 1)}
    assert "4 jobs, results in" in err and "4/4 jobs done" in err
    assert out.count("Report: ") == 1
    losses = [p.metrics["final_validation_loss_nats"] for p in points(tmp_path, task="train")]
    assert len(set(losses)) == 4, "a seed is another run"


def test_a_wrong_name_in_a_sweep_ends_it_before_the_first_job(
    quick_command: Command, tiny: list[str], tmp_path: Path
) -> None:
    code, _, err = quick_command("-m", "arch=transformer,foo", *tiny, f"output={tmp_path}")
    assert code == 2 and "error: Unknown arch: 'foo'." in err
    assert not (tmp_path / "records").exists()


def test_a_mistake_of_the_last_job_ends_a_sweep_before_the_first_job(
    quick_command: Command, tiny: list[str], tmp_path: Path
) -> None:
    code, out, err = quick_command("-m", "seed=0,1,-1", *tiny, "task=[]", f"output={tmp_path}")
    assert code == 2 and "error: seed=-1 must not be negative." in err
    assert "-- " not in err and "Report" not in out
    assert not (tmp_path / "records").exists()


@pytest.mark.parametrize(
    ("kind", "advice"), [("launcher", "launcher=local"), ("sweeper", "hydra/sweeper=basic")]
)
def test_other_launchers_and_sweepers_of_hydra_are_refused(
    kind: str, advice: str, quick_command: Command, tiny: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "conf" / "hydra" / kind
    folder.mkdir(parents=True)
    (folder / "other.yaml").write_text("defaults: [basic]\n")
    code, _, err = quick_command(
        *(f"--config-dir={tmp_path / 'conf'}", "-m", "seed=0,1", f"hydra/{kind}=other"),
        *(*tiny, "task=[]", f"output={tmp_path / 'output'}"),
    )
    assert code == 2
    assert err.splitlines()[-1].startswith(f"error: hydra/{kind}=other cannot be used here; use {advice}")
    assert not (tmp_path / "output" / "records").exists()


def test_the_configuration_can_be_printed(command: Command) -> None:
    code, out, err = command("arch=mamba", "size=small", "--cfg", "job")
    assert code == 0 and err == ""
    config = yaml.safe_load(out)
    assert config["arch"]["name"] == "mamba" and config["size"]["name"] == "small"


def test_help_names_the_groups(command: Command) -> None:
    code, out, _ = command("--help")
    assert code == 0
    for words in ("arch: ", "ttt_linear", "experiment: ", "task: ", "size: 1.3b, ", "nano, small, tiny"):
        assert words in out


def test_the_experiment_for_a_gpu_runs_on_a_cpu(
    quick_command: Command, tiny: list[str], tiny_tasks: list[str], points: Points, tmp_path: Path
) -> None:
    """The same configuration, bfloat16 included, with little of everything."""
    names = ["mamba", "transformer_squared"]
    small = ["arch.post_training.reinforce.num_steps=1", "arch.post_training.few_shot.num_iterations=1"]
    small += ["arch.tasks.adaptation.num_prompts=4", "arch.post_training.dispatch.num_expert_steps=1"]
    latency = [override for override in tiny_tasks if override.startswith("tasks.latency")]
    quality = [override for override in tiny_tasks if override not in latency]
    for arch in names:
        arguments = ["experiment=gpu_small", f"arch={arch}", "task=[perplexity,needle]", *tiny, *quality]
        arguments += small if arch == "transformer_squared" else []
        code, _, err = quick_command(*arguments, f"output={tmp_path}")
        assert code == 0, err
    code, _, err = quick_command(
        *["experiment=gpu_small", f"archs=[{','.join(names)}]", "task=[latency]", *tiny, *latency],
        *["tasks.latency.batch_sizes=[1,2]", f"output={tmp_path}"],
    )
    assert code == 0, err
    found = points(tmp_path)
    assert {p.status for p in found} == {"ok"}
    for arch in names:
        tasks = [p.task for p in found if p.arch == arch]
        assert {task: tasks.count(task) for task in tasks} == {
            "train": 1,
            "cost": 1,
            "perplexity": 1,
            "needle": 2,
            "latency": 8,
            **({"adaptation": 2 * 7} if arch == "transformer_squared" else {}),
        }
    for point in points(tmp_path, task="train"):
        assert point.details["dtype"] == "bfloat16"
    (dispatched,) = {
        p.metrics.get("dispatch_ms") is not None
        for p in points(tmp_path, arch="transformer_squared", task="latency")
        if p.cell["phase"] == "prefill"
    }
    assert dispatched


def test_times_belong_to_a_machine_and_its_threads(
    quick_command: Command,
    tiny: list[str],
    points: Points,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Training is measured once per machine, times once per machine and number of threads. A job has one
    record file per machine."""
    latency = ["tasks.latency.context_lengths_tokens=[16]", "tasks.latency.num_samples=1"]
    latency += ["tasks.perplexity.context_lengths_tokens=[16]", "tasks.perplexity.num_documents=2"]
    arguments = [*tiny, "task=[perplexity,latency]", *latency, f"output={tmp_path}"]
    threads = torch.get_num_threads()
    try:
        counts = []
        for cpu_name, num_threads in (("A", 1), ("A", 1), ("A", 2), ("B", 1)):
            monkeypatch.setattr("harness.record.environment.cpu_name", lambda cpu_name=cpu_name: cpu_name)
            code, _, err = quick_command(*arguments, f"num_threads={num_threads}")
            assert code == 0, err
            counts.append((len(points(tmp_path, task="latency")), len(points(tmp_path, task="train"))))
    finally:
        torch.set_num_threads(threads)
    assert counts == [(2, 1), (2, 1), (4, 1), (6, 2)]
    assert len(list((tmp_path / "records").iterdir())) == 4


def test_a_checkpoint_says_what_it_was_trained_on(
    quick_command: Command,
    tiny: list[str],
    points: Points,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a run that loads it too, on other threads and at another commit."""
    arguments = [*tiny, "task=[]", f"output={tmp_path}"]
    threads = torch.get_num_threads()
    try:
        for commit, num_threads in (("first", 1), ("first", 1), ("second", 2)):
            monkeypatch.setenv("LONGARCH_GIT_COMMIT", commit)
            for path in tmp_path.glob("records/*.jsonl"):
                path.unlink()
            code, out, err = quick_command(*arguments, f"num_threads={num_threads}")
            assert code == 0, err
            assert ("trained at commit first; this is second" in out) == (commit == "second")
            assert out.count("trained at commit") == (commit == "second")
    finally:
        torch.set_num_threads(threads)
    (train,) = points(tmp_path, task="train")
    assert train.details["git_commit"] == "first" and train.details["num_threads"] == 1
    assert train.details["device"] == "cpu" and train.details["implementations"]


def test_the_base_of_transformer_squared_is_the_one_of_its_own_job(
    quick_command: Command, tiny: list[str], points: Points, tmp_path: Path
) -> None:
    """With a search it is the model of the best rate, and it is not trained twice."""
    rates = [1e-4, 1e-2]
    arguments = [*tiny, "task=[]", "train.search=true", f"train.search_grid={rates}", f"output={tmp_path}"]
    assert quick_command(*arguments)[0] == 0
    checkpoints = set((tmp_path / "checkpoints").iterdir())
    assert len(checkpoints) == len(rates)
    experts = ["arch=transformer_squared", "arch.post_training.reinforce.num_steps=1"]
    experts += ["arch.post_training.few_shot.num_iterations=1"]
    code, out, err = quick_command(*arguments, *experts)
    assert code == 0, err
    assert len(set((tmp_path / "checkpoints").iterdir()) - checkpoints) == 1
    assert not points(tmp_path, task="adaptation"), "task=[] trains, no more"
    (base,), (squared,) = (
        points(tmp_path, task="train", arch=arch) for arch in ("transformer", "transformer_squared")
    )
    assert squared.metrics.keys() == {metric.name for metric in (*TRAIN_METRICS, *ADAPTED_METRICS)}
    for name in ("learning_rate", "final_validation_loss_nats", "trained_tokens"):
        assert squared.metrics[name] == base.metrics[name]
    metrics = squared.metrics
    assert metrics["base_train_seconds"] == base.metrics["train_seconds"]
    assert metrics["expert_train_seconds"] > 0 and metrics["expert_tokens"] >= 2 * 32 * 120
    seconds = metrics["base_train_seconds"] + metrics["expert_train_seconds"]
    assert metrics["train_seconds"] == pytest.approx(seconds)
    tokens = metrics["trained_tokens"] + metrics["expert_tokens"]
    assert metrics["tokens_per_s"] == pytest.approx(tokens / seconds)
    mismatch = metrics["num_parameters"] / base.metrics["num_parameters"] - 1
    assert squared.details["parameter_mismatch"] == pytest.approx(mismatch) and mismatch > 0
    assert base.details["parameter_mismatch"] is None
    assert f"transformer_squared: parameters {mismatch:+.2%} against the reference" in out
    assert squared.details["base_tokens_per_s"] == base.metrics["tokens_per_s"]


def test_a_search_trains_at_every_rate_and_keeps_the_best(
    quick_command: Command, tiny: list[str], points: Points, tmp_path: Path
) -> None:
    rates = [1e-4, 1e-2, 1e6]
    arguments = [*tiny, "task=[]", "train.search=true", f"train.search_grid={rates}", f"output={tmp_path}"]
    code, _, err = quick_command(*arguments)
    assert code == 0, err
    searched = {p.cell["learning_rate"]: p for p in points(tmp_path, task="learning_rate_search")}
    assert sorted(searched) == rates
    finished = {r: p.metrics for r, p in searched.items() if p.status == "ok"}
    assert {frozenset(metrics) for metrics in finished.values()} == {
        frozenset(m.name for m in SEARCH_METRICS)
    }
    (train,) = points(tmp_path, task="train")
    best = min(finished, key=lambda rate: finished[rate]["mixture_loss_nats"])
    assert train.metrics["learning_rate"] == best
    text_loss = finished[best]["validation_loss_nats"]
    assert train.metrics["final_validation_loss_nats"] == pytest.approx(text_loss, abs=1e-12)
