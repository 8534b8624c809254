"""Writes the points of a command that runs no jobs, such as a comparison of kernels, into a folder."""

from __future__ import annotations

import datetime
import shlex
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.record.metrics import Metric
from harness.record.schema import Header, Point, append, content_hash
from harness.record.writer import check_declared


class CommandRecords:
    """Appends points to OUTPUT/records under one header.

    output:      the folder of records, None to write none.
    module:      what the user typed after `python -m`; the file is named after its last part.
    metrics:     task -> what it declares of its numbers.
    environment: see harness.record.environment.
    config:      the settings of the command.
    """

    def __init__(
        self,
        output: str | None,
        module: str,
        *,
        metrics: Mapping[str, tuple[Metric, ...]],
        environment: dict[str, Any],
        config: dict[str, Any],
    ) -> None:
        job = module.rpartition(".")[2]
        machine = content_hash([environment.get(key) for key in ("cpu_name", "gpu_name", "device")], length=6)
        name = f"{job}-{environment['device']}-{machine}.jsonl"
        self._path = None if output is None else Path(output) / "records" / name
        self._is_header_written = False
        self._header = Header(
            run_id=uuid.uuid4().hex[:12],
            job=job,
            experiment=None,
            config=config,
            config_hash=content_hash(config),
            command=shlex.join(["python", "-m", module, *sys.argv[1:]]),
            environment=environment,
            data_hash=None,
            started_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            metrics=metrics,
        )

    def write(
        self,
        task: str,
        cell: dict[str, Any],
        identity: str,
        *,
        arch: str = "",
        size: str = "",
        seed: int = 0,
        **outcome: Any,
    ) -> None:
        """Append a point; `outcome` are fields of Point. Raises ValueError where a metric is not declared."""
        point = Point(
            run_id=self._header.run_id,
            arch=arch,
            size=size,
            seed=seed,
            task=task,
            cell=cell,
            identity=identity,
            **outcome,
        )
        check_declared(self._header, point)
        if self._path is None:
            return
        if not self._is_header_written:
            append(self._path, self._header)
            self._is_header_written = True
        append(self._path, point)
