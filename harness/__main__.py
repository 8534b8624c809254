"""The command line: `python -m harness arch=mamba size=tiny`, `python -m harness experiment=cpu_small`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hydra
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from harness.config.compose import CONFIG_DIR, register_resolvers
from harness.config.errors import sentence
from harness.run.plan import jobs_of, make_launcher
from harness.run.progress import Sweep
from harness.run.supervision import EXIT_INPUT_ERROR, EXIT_INTERRUPTED, InputError


@hydra.main(config_path=CONFIG_DIR, config_name="config", version_base="1.3")
def job(config: DictConfig) -> None:
    """Compose and check the jobs of one Hydra job. They run when all of the command's are known."""
    with _mistakes():
        if Sweep.launcher is None:
            Sweep.launcher = make_launcher(config)
        Sweep.launched += jobs_of(config)


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
    """Renders the folder's report and prints the ranking and the page's path."""
    from reports.page.html import render  # pandas and matplotlib are slow to import, and needed once
    from reports.page.terminal import ranking_text

    page = render([folder], folder / "report")
    print(ranking_text(folder))
    print(f"Report: {page}")


def main() -> int:
    """0 when done, 1 when a cell or a job's process crashed, 2 on a user's mistake, 130 when interrupted."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach the handler below instead of a traceback
    register_resolvers()
    Sweep.reset()
    try:
        job()
        with _mistakes():
            if Sweep.launched:
                Sweep.run_launched()
        for folder in Sweep.finished:
            summarise(folder)
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
    return 1 if Sweep.crashes else 0


if __name__ == "__main__":
    raise SystemExit(main())
