"""The process of a job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness import jobs


def test_a_worker_keeps_freed_memory_unless_the_user_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tmp_path / "environment.json"
    program = f"import json, os; json.dump(dict(os.environ), open({str(seen)!r}, 'w'))"
    popen = subprocess.Popen

    def start(command: list[str], **options: object) -> subprocess.Popen:
        return popen([sys.executable, "-c", program], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    for name in jobs.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    assert jobs._wait(tmp_path / "spec.json", None) == (0, False)
    environment = json.loads(seen.read_text())
    assert environment["MALLOC_TRIM_THRESHOLD_"] == "1"
    assert environment["MALLOC_MMAP_THRESHOLD_"] == jobs.ALLOCATOR["MALLOC_MMAP_THRESHOLD_"]
    assert environment["PATH"] == os.environ["PATH"]
