"""The experiments for one large GPU, with little of everything on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.record.schema import Point

Command = Callable[..., Any]
Points = Callable[..., list[Point]]

#: What runs on a CPU.
PLAIN = [
    f"implementation.{operation}=auto"
    for operation in ("attention_step", "ttt_linear", "ttt_mlp", "neural_memory", "selective_scan", "ssd")
]


def test_a_part_of_the_latency_experiment_runs_on_a_cpu(
    quick_command: Command, tiny: list[str], points: Points, tmp_path: Path
) -> None:
    names = ["mamba", "ttt_linear"]
    few = ["tasks.latency.context_lengths_tokens=[16,32]", "tasks.latency.num_samples=2"]
    few += ["tasks.latency.num_decode_steps=2", "tasks.training_speed.matmul_width=32"]
    few += ["tasks.training_speed.context_lengths_tokens=[16]", "tasks.training_speed.batch_tokens=32"]
    code, _, err = quick_command(
        *["experiment=h200_latency", f"archs=[{','.join(names)}]"],
        *[*tiny, *few, *PLAIN, f"output={tmp_path}"],
    )
    assert code == 0, err
    found = points(tmp_path)
    assert {p.status for p in found} == {"ok"} and not points(tmp_path, task="train")
    for name in names:
        cells = [(p.task, p.cell.get("phase")) for p in found if p.arch == name]
        assert sorted(cells, key=str) == sorted(
            [("latency", "prefill")] * 2 + [("latency", "decode")] * 2 + [("training_speed", None)], key=str
        )
        (training,) = points(tmp_path, arch=name, task="training_speed")
        assert training.metrics["utilisation"] > 0 and training.details["dtype"] == "bfloat16"
        for point in points(tmp_path, arch=name, task="latency"):
            if point.cell["phase"] == "decode":
                assert point.details["is_prefilled"] is False
                assert point.details["uses_decode_graph"] is False


def test_a_part_of_the_quality_experiment_runs_on_a_cpu(
    quick_command: Command, tiny: list[str], tiny_tasks: list[str], points: Points, tmp_path: Path
) -> None:
    few = [override for override in tiny_tasks if not override.startswith("tasks.latency")]
    code, _, err = quick_command(
        *["experiment=h200_quality", "arch=mamba"],
        *[*tiny, *few, *PLAIN, f"output={tmp_path}"],
    )
    assert code == 0, err
    found = points(tmp_path)
    assert {p.status for p in found} == {"ok"}
    assert sorted(p.task for p in found) == ["cost", "needle", "needle", "perplexity", "train"]


def test_the_quality_experiment_reads_code_and_books_in_one_mixture(
    quick_command: Command, tiny: list[str], tiny_tasks: list[str], points: Points, tmp_path: Path
) -> None:
    books = tmp_path / "books"
    books.mkdir()
    for index in range(4):
        (books / f"{index}.txt").write_text(f"Chapter {index}. It was the best of times.\n" * 50)
    few = [o for o in tiny_tasks if not o.startswith(("tasks.latency", "tasks.perplexity.num_documents"))]
    command = ["experiment=h200_quality", "arch=mamba", "data=code_and_books"]
    command += [o for o in tiny if not o.startswith("data")] + few + PLAIN
    command += ["tasks.perplexity.num_documents=6", f"output={tmp_path / 'out'}"]
    code, _, err = quick_command(*command, f"data.path={books}")
    assert code == 0, err
    (perplexity,) = points(tmp_path / "out", task="perplexity")
    assert set(perplexity.details["domains"]) == {"stdlib", "torch", "books"}
    code, _, err = quick_command(*command)
    assert code == 2 and err.splitlines()[-1] == "error: data.path has no value; add data.path=VALUE."
    code, _, err = quick_command(*command, f"data.path={tmp_path / 'nowhere'}")
    assert code == 2 and err.splitlines()[-1].endswith("nowhere does not exist.")
