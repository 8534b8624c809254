"""The search of the learning rate: what decides, and what cannot."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness.train import trained_model as obtain
from harness.train.errors import Diverged
from tests.conftest import compose_job


class Logbook:
    """Keeps what is written; a cell that is there already is done."""

    def __init__(self) -> None:
        self.points: dict[float, dict[str, Any]] = {}

    def done(self, arch: str, size: str, seed: int, task: str, cell: dict[str, float]) -> Any:
        return self.points.get(cell.get("learning_rate", 0.0))

    def begin(self, *what: Any) -> None:
        pass

    def write(self, arch: str, size: str, seed: int, task: str, cell: dict[str, float], **rest: Any) -> None:
        self.points[cell["learning_rate"]] = rest


def search(
    monkeypatch: pytest.MonkeyPatch, mixture: dict[float, float], text: dict[float, float]
) -> tuple[float, dict[float, dict[str, Any]]]:
    """The rate that a search ends on, and its records, where training at a rate gives those losses."""
    trained: list[float] = []

    def train_at(job: Any, model_config: Any, rate: float) -> obtain.TrainedModel:
        trained.append(rate)
        metrics = {"final_validation_loss_nats": text[rate], "learning_rate": rate}
        point = obtain.TrainPoint(metrics=metrics, samples={}, details={})
        return obtain.TrainedModel(model=torch.nn.Identity(), point=point)  # type: ignore[arg-type]

    monkeypatch.setattr(obtain, "_train_at", train_at)
    monkeypatch.setattr(obtain, "mean_loss", lambda *arguments, **settings: mixture[trained[-1]])
    logbook: Any = Logbook()
    grid = ",".join(map(str, mixture))
    config = compose_job("size=nano", "train.search=true", f"train.search_grid=[{grid}]")
    stream = SimpleNamespace(mixture_batches=lambda: iter([None]))
    job = obtain.JobContext(config, torch.device("cpu"), torch.float32, None, stream, logbook)
    best = obtain._search(job, {})
    return best.point.metrics["learning_rate"], logbook.points


def test_the_held_out_mixture_decides_and_not_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    best, points = search(monkeypatch, {0.1: 3.0, 0.2: 1.0, 0.3: 2.0}, {0.1: 1.0, 0.2: 3.0, 0.3: 2.0})
    assert best == 0.2
    assert points[0.2]["metrics"] == {"mixture_loss_nats": 1.0, "validation_loss_nats": 3.0}


def test_a_loss_that_is_no_number_is_a_divergence_of_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    best, points = search(monkeypatch, {0.1: math.nan, 0.2: 1.0}, {0.1: 1.0, 0.2: 1.0})
    assert best == 0.2
    assert points[0.1]["status"] == "diverged" and "nan" in points[0.1]["reason"]
    with pytest.raises(Diverged, match="every learning rate"):
        search(monkeypatch, {0.1: math.nan}, {0.1: 1.0})
