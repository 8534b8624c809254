"""The experiments for one large GPU, with little of everything on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.record import Point

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
        *["experiment=h200_latency", f"interleave=[{','.join(names)}]"],
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
        *["experiment=h200_quality", "hydra.mode=RUN", "arch=mamba"],
        *[*tiny, *few, *PLAIN, f"output={tmp_path}"],
    )
    assert code == 0, err
    found = points(tmp_path)
    assert {p.status for p in found} == {"ok"}
    assert sorted(p.task for p in found) == ["cost", "needle", "needle", "perplexity", "train"]
