"""The process of a job."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from harness.run import supervision as jobs
from harness.run import worker
from tests.conftest import compose_job


def test_a_worker_keeps_freed_memory_unless_the_user_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tmp_path / "environment.json"
    program = f"import json, os; json.dump(dict(os.environ), open({str(seen)!r}, 'w'))"
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\n{program}")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    for name in jobs.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    assert jobs.start_worker(tmp_path / "spec.json", 0).wait(30) == 0
    environment = json.loads(seen.read_text())
    assert environment["MALLOC_TRIM_THRESHOLD_"] == "1"
    assert environment["MALLOC_MMAP_THRESHOLD_"] == jobs.ALLOCATOR["MALLOC_MMAP_THRESHOLD_"]
    assert environment["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize(("num_threads", "num_workers", "expected"), [(None, 1, 4), (None, 3, 1), (3, 2, 3)])
def test_threads_are_shared_by_what_runs_at_once(
    num_threads: int | None, num_workers: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    given = "null" if num_threads is None else num_threads
    config = compose_job("arch=mamba", f"num_threads={given}", f"num_workers={num_workers}")
    assert worker.num_threads(config) == expected
