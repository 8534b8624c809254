"""The process of one job: `python -m harness.worker SPEC.json`, started by harness.jobs."""

from __future__ import annotations

import datetime
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from harness import environment, interleaved, quality
from harness.config_dir import register_resolvers
from harness.errors import sentence
from harness.jobs import EXIT_INPUT_ERROR, EXIT_INTERRUPTED
from harness.logbook import Logbook
from harness.record import Header

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(spec_path: str) -> int:
    """Runs the job and returns the exit code; a user's mistake is one sentence on stderr."""
    _end_with_parent()
    try:
        _run(json.loads(Path(spec_path).read_text()))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (ValueError, OSError) as error:
        if os.environ.get("LONGARCH_TRACEBACK"):
            traceback.print_exc()
        print(f"error: {sentence(error)}", file=sys.stderr)
        return EXIT_INPUT_ERROR
    return 0


def _run(spec: dict[str, Any]) -> None:
    register_resolvers()
    config = spec["configs"][0]
    if config["num_threads"] is not None:
        torch.set_num_threads(config["num_threads"])
    device, dtype = choose_device(config["device"]), choose_dtype(config["dtype"])
    run = interleaved.run if spec["kind"] == "latency" else quality.run
    run(spec, device, dtype, _logbook_maker(spec, device))


def _logbook_maker(spec: dict[str, Any], device: torch.device) -> Callable[[str | None], Logbook]:
    """A function of the data's hash, which is known only once the data are read."""

    def make(data_hash: str | None) -> Logbook:
        config = spec["configs"][0]
        header = Header(
            run_id=spec["run_ids"][-1],
            job=spec["job"],
            experiment=config["experiment_name"],
            config={**config, "interleaved": [c["arch"] for c in spec["configs"][1:]]},
            config_hash=spec["config_hash"],
            command=spec["command"],
            environment=environment.describe(device),
            data_hash=data_hash,
            started_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        # A file holds one job on one kind of device: a later run elsewhere measures anew.
        path = Path(config["output"]) / "records" / f"{spec['job']}-{device.type}-{spec['config_hash']}.jsonl"
        logbook = Logbook(
            path,
            header,
            in_flight_path=Path(spec["in_flight_path"]),
            run_ids=spec["run_ids"],
            retry_failed=config["retry_failed"],
        )
        if logbook.num_damaged:
            print(
                f"{path}: {logbook.num_damaged} damaged line(s) are left as they are; "
                "their cells are measured again.",
                file=sys.stderr,
            )
        return logbook

    return make


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises ValueError where the device is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device={name!r} is unknown; choose auto, cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: torch sees no CUDA device here; choose device=cpu.")
    return torch.device(name)


def choose_dtype(name: str) -> torch.dtype:
    """Raises ValueError for anything but float32 and bfloat16."""
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r} is unknown; choose {' or '.join(DTYPES)}.")
    return DTYPES[name]


def _end_with_parent() -> None:
    """A killed parent leaves no orphan at work."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
