"""The process of one job: `python -m harness.run.worker SPEC.json`, started by harness.run.supervision."""

from __future__ import annotations

import dataclasses
import datetime
import gc
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

from harness.config.build import checked_job
from harness.config.compose import register_resolvers
from harness.config.errors import sentence
from harness.config.schema import JobConfig
from harness.record import environment
from harness.record.in_flight import InFlight, clear
from harness.record.outcomes import is_out_of_memory
from harness.record.schema import Header, Point, content_hash
from harness.record.writer import RecordWriter
from harness.run import model_job as quality
from harness.run import timing_job as interleaved
from harness.run.header import declarations, identities
from harness.run.supervision import EXIT_CRASHED, EXIT_INPUT_ERROR, EXIT_OUT_OF_MEMORY


def main(spec_path: str) -> int:
    """Run the job in a process that ends with its parent, and return the exit code."""
    _end_with(json.loads(Path(spec_path).read_text())["parent_pid"])
    return run(spec_path)


def run(spec_path: str) -> int:
    """Run the job and return the exit code; a user's mistake is one sentence on stderr."""
    try:
        _run(json.loads(Path(spec_path).read_text()))
    except (ValueError, OSError) as error:
        if os.environ.get("LONGARCH_TRACEBACK"):
            traceback.print_exc()
        print(f"error: {sentence(error)}", file=sys.stderr)
        return EXIT_INPUT_ERROR
    except Exception as error:  # the parent puts it down to the cell under way
        traceback.print_exc()
        return EXIT_OUT_OF_MEMORY if is_out_of_memory(error) else EXIT_CRASHED
    return 0


def _run(spec: dict[str, Any]) -> None:
    gc.freeze()  # what is imported stays: collecting before each measurement would look through all of it
    register_resolvers()
    spec = {**spec, "configs": [checked_job(values) for values in spec["configs"]]}
    config: JobConfig = spec["configs"][0]
    torch.set_num_threads(num_threads(config))
    device, dtype = environment.choose_device(config.device), getattr(torch, config.dtype)
    run = interleaved.run if spec["kind"] == "latency" else quality.run
    header = _header(spec, device)
    _announce(spec, device, header)
    run(spec, device, dtype, _logbook_maker(spec, device, header))
    clear(Path(spec["in_flight_path"]))


def _announce(spec: dict[str, Any], device: torch.device, header: Header) -> None:
    """A death before the first cell is put down to training, or to the calibration of a latency job."""
    config = spec["configs"][0]
    is_latency = spec["kind"] == "latency"
    arch, task = ("", "calibration") if is_latency else (config.arch.name, "train")
    point = Point(
        run_id=header.run_id,
        arch=arch,
        size=config.size.name,
        seed=config.seed,
        task=task,
        cell={},
        identity=header.identities[arch][task],
    )
    note = InFlight(record_path=_record_path(spec, device), point=point, header=header)
    note.write(Path(spec["in_flight_path"]))


def _header(spec: dict[str, Any], device: torch.device) -> Header:
    config = spec["configs"][0]
    output, here = Path(config.output), Path.cwd()
    shown = output.relative_to(here) if output.is_relative_to(here) else output  # records are published
    interleaved_archs = [other.arch.to_plain() for other in spec["configs"][1:]]
    values = {**config.to_plain(), "output": str(shown), "interleaved": interleaved_archs}
    described = environment.describe(device)
    return Header(
        run_id=spec["run_ids"][-1],
        job=spec["job"],
        experiment=config.experiment_name,
        config=values,
        config_hash=spec["config_hash"],
        command=spec["command"],
        environment=described,
        data_hash=None,
        identities=_identities(spec, values, described, None),
        metrics=declarations(spec["configs"]),
        started_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
    )


def _identities(
    spec: dict[str, Any], config: dict[str, Any], described: dict[str, Any], data_hash: str | None
) -> dict[str, dict[str, str]]:
    return identities(
        spec["kind"], spec["configs"], environment=described, config=config, data_hash=data_hash
    )


def _record_path(spec: dict[str, Any], device: torch.device) -> Path:
    """Return the record file of the job on this kind of machine.

    A run on another kind measures anew, and the files of both can be copied into one folder."""
    gpu_name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    machine = content_hash([environment.cpu_name(), gpu_name, device.type], length=6)
    name = f"{spec['job']}-{device.type}-{machine}.jsonl"
    return Path(spec["configs"][0].output) / "records" / name


def _logbook_maker(
    spec: dict[str, Any], device: torch.device, header: Header
) -> Callable[[str | None], RecordWriter]:
    """A function of the data's hash, which is known only once the data are read."""

    def make(data_hash: str | None) -> RecordWriter:
        path = _record_path(spec, device)
        logbook = RecordWriter(
            path,
            dataclasses.replace(
                header,
                data_hash=data_hash,
                identities=_identities(spec, header.config, header.environment, data_hash),
            ),
            in_flight_path=Path(spec["in_flight_path"]),
            run_ids=spec["run_ids"],
            retry_failed=spec["configs"][0].retry_failed,
        )
        if logbook.num_damaged:
            print(
                f"{path}: {logbook.num_damaged} damaged line(s) are left as they are; "
                "their cells are measured again.",
                file=sys.stderr,
            )
        return logbook

    return make


def num_threads(config: JobConfig) -> int:
    """Return the CPU threads of the process: num_threads, else torch's own choice, which the jobs that run at
    once share."""
    if config.num_threads is not None:
        return config.num_threads
    assert config.num_workers != "auto", "a plan has chosen"
    return max(1, torch.get_num_threads() // config.num_workers)


def _end_with(parent_pid: int) -> None:
    """A killed parent leaves no orphan at work."""

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(0.5)
        os._exit(EXIT_CRASHED)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is on the disk: what a library does on its way out must not count as a crash
