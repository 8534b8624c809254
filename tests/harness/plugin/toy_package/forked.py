"""What a forked worker does; imported once, by the process that workers are forked from."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading

import torch._dynamo  # noqa: F401  (the first optimizer imports it)

from harness.run import worker


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def work(spec_path: str, environment: dict[str, str]) -> None:
    """`python -m harness.run.worker SPEC.json` in `environment`. The process that the spec names as its
    parent is that of the server it is forked from."""
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    code = worker.run(spec_path)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
