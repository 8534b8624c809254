"""The command line: `python -m harness arch=mamba size=tiny`, `python -m harness experiment=cpu_small`."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from harness.config.compose import CONFIG_DIR, register_resolvers
from harness.config.errors import sentence
from harness.config.schema import JobConfig
from harness.run.launcher import Launcher
from harness.run.plan import job_configs, make_launcher, make_plan
from harness.run.progress import Progress, tell
from harness.run.supervision import EXIT_INPUT_ERROR, EXIT_INTERRUPTED, InputError


class Command:
    """One command: what Hydra composes of it, then its plan.

    launcher:  runs the jobs; None: the one that the configuration names.
    summarise: is called with each folder of results.
    """

    def __init__(self, launcher: Launcher | None, summarise: Callable[[Path], None]) -> None:
        self.launcher, self.summarise = launcher, summarise
        self.configs: list[JobConfig] = []

    def compose(self, config: DictConfig) -> None:
        """Take the configurations of one job of Hydra's. They run when all of the command's are known."""
        with _mistakes():
            if self.launcher is None:
                self.launcher = make_launcher(config)
            self.configs += job_configs(config, HydraConfig.get().overrides.task)

    def run(self) -> bool:
        """Plan the jobs and run them, and return whether none has crashed."""
        if self.launcher is None:  # Hydra has printed what it was asked for
            return True
        line = shlex.join(["python", "-m", "harness", *sys.argv[1:]])
        with _mistakes():
            plan = make_plan(self.configs, is_local=self.launcher.is_local, command=line)
            is_sweep = len(self.configs) > 1
            if is_sweep:
                tell(f"{len(plan.jobs)} jobs, results in {plan.outputs[0]}")
            progress = Progress(len(plan.jobs) if is_sweep else 1)
            self.launcher.run(plan.jobs, progress.on_end)
        for folder in plan.outputs:
            self.summarise(folder)
        return not progress.crashes


@contextmanager
def _mistakes() -> Iterator[None]:
    """A user's mistake is one sentence and an exit code; Hydra would print more."""
    try:
        yield
    except (ValueError, OSError, OmegaConfBaseException) as error:
        if not isinstance(error, InputError) or str(error):
            print(f"error: {sentence(error)}", file=sys.stderr)
        raise SystemExit(EXIT_INPUT_ERROR) from None


def summarise(folder: Path) -> None:
    """Render the folder's report and print the ranking and the page's path."""
    from reports.page.html import render  # pandas and matplotlib are slow to import, and needed once
    from reports.page.terminal import ranking_text

    page = render([folder], folder / "report")
    print(ranking_text(folder))
    print(f"Report: {page}")


def main(
    arguments: Sequence[str] | None = None,
    *,
    launcher: Launcher | None = None,
    summarise: Callable[[Path], None] = summarise,
) -> int:
    """Run a command and return its exit status: 0 when done, 1 when a cell or a job's process crashed, 2 on a
    user's mistake, 130 when interrupted.

    arguments: what is typed after `python -m harness`; None: those of this process.
    launcher:  runs the jobs; None: the one that the configuration names.
    summarise: is called with each folder of results.
    """
    if arguments is not None:  # Hydra reads them from nowhere else
        sys.argv = [sys.argv[0], *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach the handler below instead of a traceback
    register_resolvers()
    command = Command(launcher, summarise)
    try:
        hydra.main(config_path=CONFIG_DIR, config_name="config", version_base="1.3")(command.compose)()
        return 0 if command.run() else 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough
        print("\nStopped. What is measured is kept; the same command goes on from there.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        text = sentence(error)
        if text is None:
            raise
        print(f"error: {text}", file=sys.stderr)
        return EXIT_INPUT_ERROR


if __name__ == "__main__":
    raise SystemExit(main())
