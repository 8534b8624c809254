"""What a forked worker does; imported once, by the process that workers are forked from."""

from __future__ import annotations

import os
import sys

import torch._dynamo  # noqa: F401  (the first optimizer imports it)

from harness import worker


def work(spec_path: str, environment: dict[str, str]) -> None:
    """`python -m harness.worker SPEC.json` in `environment`. It does not end with the parent that the spec
    names, which is not its own."""
    os.environ.clear()
    os.environ.update(environment)
    worker._end_with = lambda parent_pid: None
    code = worker.main(spec_path)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
