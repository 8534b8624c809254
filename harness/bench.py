"""`python -m harness.bench [OVERRIDE ...]`: the default experiment of this machine.

gpu_small where torch can use a GPU, else cpu_small, unless an override names another; says which and
why, and then is `python -m harness`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import torch


def choose() -> tuple[str, str]:
    """The experiment, and the reason as a sentence."""
    if torch.cuda.is_available():
        return "gpu_small", f"torch can use a GPU here, {torch.cuda.get_device_name(0)}."
    gpu = _listed_gpu()
    if gpu is None:
        return "cpu_small", "there is no GPU here that torch can use."
    build = "has no CUDA" if torch.version.cuda is None else f"is built for CUDA {torch.version.cuda}"
    return (
        "cpu_small",
        f"there is a GPU here, {gpu}, but torch cannot use it: torch {torch.__version__} {build}.",
    )


def _listed_gpu() -> str | None:
    """The first GPU that the driver lists, whatever torch says."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return listed.stdout.strip().splitlines()[0] if listed.stdout.strip() else None


def main(overrides: list[str]) -> None:
    """Does not return: the process becomes the harness, which is then told what was chosen."""
    if not any(override.lstrip("+").startswith("experiment=") for override in overrides):
        experiment, reason = choose()
        print(f"Running experiment={experiment}: {reason}", flush=True)
        overrides = [f"experiment={experiment}", *overrides]
    os.execv(sys.executable, [sys.executable, "-m", "harness", *overrides])


if __name__ == "__main__":
    main(sys.argv[1:])
