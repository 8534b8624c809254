"""What Hydra tells the harness, and what its jobs tell the command line: how far a sweep is."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from harness.record.schema import Point
from harness.run.launcher import LaunchedJob, Launcher
from harness.run.supervision import EXIT_INPUT_ERROR


class Sweep(Callback):
    """The sweep of this process, kept on the class: Hydra makes the instance, and calls each job with nothing
    but its configuration.

    finished: folders to report on. Hydra turns an exception in a callback into a warning, so harness.__main__
              renders.
    crashes:  a sentence for every cell or process that crashed.
    launched: all jobs of the command. Hydra's jobs only compose and check them.
    launcher: runs `launched` when all are known; None: no job is known yet.
    """

    finished: ClassVar[list[Path]]
    crashes: ClassVar[list[str]]
    launcher: ClassVar[Launcher | None]
    launched: ClassVar[list[LaunchedJob]]
    _is_sweep: ClassVar[bool]
    _started: ClassVar[float]
    _num_done: ClassVar[int]

    @classmethod
    def reset(cls) -> None:
        """Forgets what was run before in this process."""
        cls.finished, cls.crashes = [], []
        cls.launcher, cls.launched = None, []
        cls._is_sweep = False
        cls._started, cls._num_done = time.monotonic(), 0

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse other launchers and sweepers of Hydra's. Only SystemExit ends Hydra from a callback."""
        instead = {"launcher": "launcher=local or launcher=slurm", "sweeper": "hydra/sweeper=basic"}
        for kind, ours in instead.items():
            choice = config.hydra.runtime.choices[f"hydra/{kind}"]
            if choice != "basic":
                print(f"error: hydra/{kind}={choice} cannot be used here; use {ours}.", file=sys.stderr)
                raise SystemExit(EXIT_INPUT_ERROR)
        Sweep._is_sweep = True

    @classmethod
    def run_launched(cls) -> None:
        """Run all jobs of the command, which are composed and checked, on its launcher."""
        assert cls.launcher is not None
        cls._started = time.monotonic()
        if cls._is_sweep:
            tell(f"{len(cls.launched)} jobs, results in {cls.launched[0].output}")
        cls.launcher.run(cls.launched, cls.job_done)

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
        left = elapsed / done * max(0, len(cls.launched) - done)
        if cls._is_sweep and len(cls.launched) > 1:
            tell(
                f"{cls._num_done}/{len(cls.launched)} jobs done after {_minutes(elapsed)}, "
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
