"""Every file in conf/data makes a source, and the two quality tasks are made from theirs."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.config.build import check_targets, instantiate, resolve
from harness.config.compose import compose_config
from tasks.base import Task
from tasks.data.sources import Source

CONFIG = Path(__file__).resolve().parents[2] / "conf"
NEED_A_PATH = ("code_and_books", "huggingface", "text_folder")


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIG / "data").glob("*.yaml")))
def test_every_data_configuration_makes_a_source(name: str, tmp_path: Path) -> None:
    path = [f"data.path={tmp_path}"] if name in NEED_A_PATH else []
    data = resolve(compose_config([f"data={name}", *path]))["data"]
    check_targets(data, "data")
    source = instantiate(data["corpus"]["source"])
    assert isinstance(source, Source) and source.name


@pytest.mark.parametrize("name", ["perplexity", "needle"])
def test_the_task_configurations_make_tasks_with_cells(name: str) -> None:
    tasks = resolve(compose_config([]))["tasks"]
    check_targets(tasks[name], f"tasks.{name}")
    task = instantiate(tasks[name])
    assert isinstance(task, Task) and task.name == name and task.cells()
