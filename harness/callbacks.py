"""What Hydra tells the harness: a sweep begins, a job ends, all is done."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class Sweep(Callback):
    """Prints how far a sweep is and how long it has left, and remembers what folder to report on.

    Hydra turns an exception in a callback into a warning, so the report itself is rendered by
    harness.__main__, from `finished`. What Hydra takes for a job's end is the start of its process where
    several run at once, so harness.__main__ says when one is done.
    """

    finished: ClassVar[list[Path]] = []
    started: ClassVar[float] = 0.0
    num_jobs: ClassVar[int] = 1
    num_done: ClassVar[int] = 0

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Counts the jobs of the grid."""
        params = config.hydra.sweeper.params or {}
        overrides = [*(f"{key}={value}" for key, value in params.items()), *config.hydra.overrides.task]
        axes: dict[str, int] = {}  # what the command line says of a key holds over the experiment
        for override in OverridesParser.create().parse_overrides(overrides):
            is_sweep = override.is_sweep_override() and override.is_discrete_sweep()
            axes[override.get_key_element()] = len(list(override.sweep_string_iterator())) if is_sweep else 1
        Sweep.started, Sweep.num_jobs, Sweep.num_done = time.monotonic(), math.prod(axes.values()), 0
        print(f"{Sweep.num_jobs} jobs, results in {config.output}", file=sys.stderr, flush=True)

    @classmethod
    def job_done(cls) -> None:
        """Says what is left, from the mean of the jobs so far."""
        cls.num_done += 1
        elapsed = time.monotonic() - cls.started
        left = elapsed / cls.num_done * max(0, cls.num_jobs - cls.num_done)
        if cls.num_jobs > 1:
            clear_line = "\r\x1b[K" if sys.stderr.isatty() else ""  # of a progress bar
            print(
                f"{clear_line}{cls.num_done}/{cls.num_jobs} jobs done after {_minutes(elapsed)}, "
                f"about {_minutes(left)} left",
                file=sys.stderr,
                flush=True,
            )

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        """A single job has its report too."""
        self.finished.append(Path(config.output))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """The sweep's report."""
        self.finished.append(Path(config.output))


def _minutes(seconds: float) -> str:
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
