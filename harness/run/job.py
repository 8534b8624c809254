"""One job of a plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config.identity import NOT_RESULT_KEYS
from harness.config.schema import JobConfig
from harness.record.schema import content_hash


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """One job, ready to run.

    is_timing:  it times architectures in turn, so that nothing may run beside it. Else it trains or loads one
                model and measures it.
    configs:    one per architecture; a model job has one.
    command:    what the user typed.
    num_at_once: how many jobs may run at once on this machine while this one runs, itself included.
    """

    is_timing: bool
    configs: tuple[JobConfig, ...]
    command: str
    num_at_once: int = 1

    @property
    def name(self) -> str:
        """The name of the job, and of its record files."""
        first = self.configs[0]
        name = first.arch.name
        if self.is_timing:
            name = "latency" if len(self.configs) > 1 else f"latency-{name}"
        return f"{name}-{first.size.name}-seed{first.seed}"

    @property
    def output(self) -> Path:
        """The folder of its results."""
        return Path(self.configs[0].output)

    @property
    def timeout_s(self) -> float:
        """Seconds after which it is stopped."""
        return self.configs[0].job_timeout_s

    def to_plain(self) -> dict[str, Any]:
        """Return what the worker reads, as JSON values."""
        ignored = [key for key in NOT_RESULT_KEYS if not self.is_timing or key != "num_threads"]
        values = [one.to_plain() | {"num_workers": self.num_at_once} for one in self.configs]
        kept = [{key: value for key, value in one.items() if key not in ignored} for one in values]
        return {
            "kind": "latency" if self.is_timing else "quality",
            "job": self.name,
            "configs": values,
            "config_hash": content_hash(kept),
            "command": self.command,
        }
