"""What a measurement ran on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[2]

#: How the names of environment variables begin that change what is measured.
VARIABLES = ("MALLOC_", "OMP_", "MKL_", "TRITON_INTERPRET")

#: Packages whose version is recorded where they are installed.
PACKAGES = (
    *("triton", "mamba-ssm", "flash-attn", "causal-conv1d", "flash-linear-attention"),
    *("hydra-core", "numpy", "transformers", "tokenizers", "datasets"),
)


def describe(device: torch.device) -> dict[str, Any]:
    """Machine, versions and commit, as plain data. What cannot be found out is None.

    The commit comes from git, or from LONGARCH_GIT_COMMIT where there is no .git."""
    commit, is_dirty = git_commit()
    environment: dict[str, Any] = {
        "device": device.type,
        "cpu_name": cpu_name(),
        "num_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "gpu_name": None,
        "gpu_memory_bytes": None,
        "driver": None,
        "cuda": torch.version.cuda,
        "cudnn": None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "variables": {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)},
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "git_commit": commit,
        "is_dirty": is_dirty,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        environment["gpu_name"] = properties.name
        environment["gpu_memory_bytes"] = properties.total_memory
        environment["cudnn"] = torch.backends.cudnn.version()
        environment["driver"] = _output(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        )
    return environment


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises ValueError where the device is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: torch sees no CUDA device here; choose device=cpu.")
    return torch.device(name)


def git_commit() -> tuple[str | None, bool | None]:
    """Return the commit and whether tracked files differ from it; (None, None) where neither is known."""
    given = os.environ.get("LONGARCH_GIT_COMMIT")
    if given:
        return given.removesuffix("-dirty"), given.endswith("-dirty")
    git = ["git", "-C", str(REPOSITORY)]
    if not (REPOSITORY / ".git").exists():
        return None, None
    commit = _output([*git, "rev-parse", "HEAD"])
    if commit is None:
        return None, None
    return commit, bool(_output([*git, "status", "--porcelain", "--untracked-files=no"]))


def cpu_name() -> str | None:
    """Return the processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
