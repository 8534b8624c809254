"""Training speed: steps in turn, nothing left behind, utilisation by the formula, typed failures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from archs.base import SequenceModel
from harness.measure.turns import TimingRun
from tasks.training_speed import TrainingSpeed

CPU = torch.device("cpu")
CELL = {"context_tokens": 16, "batch_size": 2}


def new_task(**changes: Any) -> TrainingSpeed:
    fields: dict[str, Any] = {
        "context_lengths_tokens": [64, 16],
        "batch_tokens": 32,
        "num_samples": 3,
        "matmul_width": 32,
    }
    return TrainingSpeed(**fields | changes)


def run(
    task: TrainingSpeed,
    models: dict[str, SequenceModel],
    cell: dict[str, Any] = CELL,
    timing_run: TimingRun | None = None,
) -> dict[str, Any]:
    return dict(task.measure_in_turn(models, cell, timing_run or TimingRun(CPU)))


def test_a_step_holds_as_many_sequences_as_its_tokens_allow() -> None:
    assert new_task().cells() == [CELL, {"context_tokens": 64, "batch_size": 1}]


def test_models_take_turns_and_leave_no_gradients(new_model: Callable[..., SequenceModel]) -> None:
    names = ("transformer", "mamba", "transformer_squared")
    models = {name: new_model(name, dtype=torch.float32) for name in names}
    turns: list[str] = []
    with torch.no_grad():  # as whoever measures latency may be in
        results = dict(new_task().measure_in_turn(models, CELL, TimingRun(CPU), turns.append))
    assert turns == [*names, *names * 3]
    for name, model in models.items():
        metrics = results[name].metrics
        ordered = sorted(results[name].samples["time_ms"])
        assert metrics.keys() == {metric.name for metric in TrainingSpeed.METRICS}
        assert len(ordered) == 3 and metrics["median_ms"] == ordered[1]
        assert metrics["tokens_per_s"] == pytest.approx(1e3 * 32 / ordered[1])
        assert metrics["peak_memory_bytes"] > 0
        assert metrics["utilisation"] == metrics["model_flops_per_s"] / metrics["matmul_flops_per_s"]
        assert all(parameter.grad is None for parameter in model.parameters())


def test_the_flops_are_three_forward_passes_with_all_logits(new_model: Callable[..., SequenceModel]) -> None:
    model = new_model("transformer", dtype=torch.float32)
    result = run(new_task(), {"a": model})["a"]
    flops = model.flops(16, "prefill")
    head = 2 * model.head.weight.numel()
    forward = flops.matmul + flops.attention + 15 * head
    per_s = result.metrics["model_flops_per_s"]
    assert per_s == pytest.approx(3 * 2 * forward * 1e3 / result.metrics["median_ms"])


def test_out_of_memory_and_slowness_are_typed(
    new_model: Callable[..., SequenceModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {name: new_model(name, dtype=torch.float32) for name in ("transformer", "mamba")}

    def fail(*arguments: Any) -> Any:
        raise RuntimeError("CUDA out of memory. Tried to allocate 1 PiB")

    monkeypatch.setattr(models["mamba"], "loss", fail)
    task, timing_run = new_task(max_cell_s=1e-9), TimingRun(CPU)
    results = run(task, models, timing_run=timing_run)
    assert results["mamba"] == ("oom", "RuntimeError: CUDA out of memory. Tried to allocate 1 PiB")
    assert results["transformer"][0] == "timeout" and "max_cell_s" in results["transformer"][1]
    longer = run(
        task, {"transformer": models["transformer"]}, {"context_tokens": 64, "batch_size": 1}, timing_run
    )
    assert longer["transformer"] == ("timeout", "16 tokens took longer than max_cell_s=1e-09")


@pytest.mark.parametrize(
    ("name", "value"), [("context_lengths_tokens", []), ("batch_tokens", 0), ("max_cell_s", 0)]
)
def test_settings_that_make_no_sense(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}=.* must be positive"):
        new_task(**{name: value})
