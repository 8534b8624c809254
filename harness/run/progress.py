"""What Hydra tells the harness, and what its jobs tell the command line: how far a sweep is."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from harness.record.schema import Point
from harness.run.launcher import LaunchedJob, Launcher
from harness.run.local import Pool


class Sweep(Callback):
    """The sweep of this process, kept on the class: Hydra makes the instance, and calls each job with nothing
    but its configuration.

    finished: folders to report on. Hydra turns an exception in a callback into a warning, so harness.__main__
              renders.
    crashes:  a sentence for every cell or process that crashed.
    launcher: runs `launched` when all are known; None: `pool` runs each at once.
    pool:     runs the jobs. What Hydra takes for a job's end is its start where several run at once.
    """

    finished: ClassVar[list[Path]]
    crashes: ClassVar[list[str]]
    pool: ClassVar[Pool]
    launcher: ClassVar[Launcher | None]
    launched: ClassVar[list[LaunchedJob]]
    _started: ClassVar[float]
    _num_jobs: ClassVar[int]
    _num_done: ClassVar[int]

    @classmethod
    def reset(cls) -> None:
        """Forgets what was run before in this process."""
        cls.finished, cls.crashes, cls.pool = [], [], Pool(cls.job_done)
        cls.launcher, cls.launched = None, []
        cls._started, cls._num_jobs, cls._num_done = time.monotonic(), 1, 0

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Counts the jobs of the grid."""
        params = config.hydra.sweeper.params or {}
        overrides = [*(f"{key}={value}" for key, value in params.items()), *config.hydra.overrides.task]
        axes: dict[str, int] = {}  # what the command line says of a key holds over the experiment
        for override in OverridesParser.create().parse_overrides(overrides):
            is_sweep = override.is_sweep_override() and override.is_discrete_sweep()
            axes[override.get_key_element()] = len(list(override.sweep_string_iterator())) if is_sweep else 1
        Sweep._num_jobs = math.prod(axes.values())
        tell(f"{Sweep._num_jobs} jobs, results in {config.output}")

    @classmethod
    def job_done(cls, failures: list[Point], num_under_way: int) -> None:
        """Says what failed, and how much time is left: by the mean of the jobs so far, where those under way
        count as half done."""
        for point in failures:
            text = f"{point.arch}, {point.task} {point.cell}: {point.status}: {point.reason}"
            tell(text)
            if point.status == "crashed":
                cls.crashes.append(text)
        cls._num_done += 1
        elapsed, done = time.monotonic() - cls._started, cls._num_done + num_under_way / 2
        left = elapsed / done * max(0, cls._num_jobs - done)
        if cls._num_jobs > 1:
            tell(
                f"{cls._num_done}/{cls._num_jobs} jobs done after {_minutes(elapsed)}, "
                f"about {_minutes(left)} left"
            )

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        """A single job has its report too."""
        self.finished.append(Path(config.output))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """The sweep's report."""
        self.finished.append(Path(config.output))


def tell(text: str) -> None:
    """One line on stderr, in place of the progress bar that the cursor may stand on."""
    clear_line = "\r\x1b[K" if sys.stderr.isatty() else ""
    print(f"{clear_line}{text}", file=sys.stderr, flush=True)


def _minutes(seconds: float) -> str:
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


Sweep.reset()
