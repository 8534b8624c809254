"""The synthetic experiment builder, and one rendered report that many tests look at."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from filelock import FileLock

from harness.record.schema import Point
from reports.page.html import render


@pytest.fixture(scope="session")
def builder() -> ModuleType:
    """The module beside this file; the test folders are no packages."""
    name = "longarch_reports_builder"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("builder.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Rendered:
    """A report, its text, and the folder its records are in."""

    folder: Path
    page: Path
    text: str


@pytest.fixture(scope="session")
def rendered(builder: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    """All architectures; one diverged, one out of memory at the longest needle and latency cells, one
    line cut short."""

    def change(point: Point) -> Point | None:
        if point.arch == "titans_mal" and point.task not in ("cost", "learning_rate_search", "latency"):
            return builder.failed(point, "diverged", "the loss is <NaN> at step 17")
        if point.arch == "recurrent" and point.task == "latency" and point.cell["context_tokens"] == 4096:
            return builder.failed(point, "timeout", "took longer than 60 s")
        if point.arch == "transformer" and point.task == "needle" and point.cell["context_tokens"] == 4096:
            return builder.failed(point, "oom", "needed 3 GiB")
        return point

    shared = tmp_path_factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else None
    folder = (shared or tmp_path_factory.mktemp("rendered")) / "example"
    with FileLock(folder.with_suffix(".lock")):  # once for all processes of a run: it takes seconds
        if not (folder / "is_whole").exists():
            builder.write_experiment(folder, change=change)
            with (folder / "records" / "latency.jsonl").open("a") as file:
                file.write('{"kind": "point", "schema_ver\n')
            render([folder], folder / "report")
            (folder / "is_whole").touch()
    page = folder / "report" / "index.html"
    return Rendered(folder=folder, page=page, text=page.read_text(encoding="utf-8"))
