"""Hydra's own launchers and sweepers, which the harness does not use."""

from __future__ import annotations

import sys
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from harness.run.supervision import EXIT_INPUT_ERROR


class OwnLaunchers(Callback):
    """Refuses Hydra's launchers and sweepers, the basic ones apart: those only compose configurations."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Raise SystemExit where another is chosen: no other exception ends Hydra from a callback."""
        instead = {"launcher": "launcher=local or launcher=slurm", "sweeper": "hydra/sweeper=basic"}
        for kind, ours in instead.items():
            choice = config.hydra.runtime.choices[f"hydra/{kind}"]
            if choice != "basic":
                print(f"error: hydra/{kind}={choice} cannot be used here; use {ours}.", file=sys.stderr)
                raise SystemExit(EXIT_INPUT_ERROR)
