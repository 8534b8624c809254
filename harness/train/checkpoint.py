"""Checkpoints: tensors in safetensors files, written beside and then renamed into place."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from harness.train.errors import CheckpointError

T = TypeVar("T")


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and text; the file appears whole or not at all.

    Raises CheckpointError where it cannot be written."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    copies = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(copies, temporary, metadata)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # else power that fails leaves the name without the content
        os.replace(temporary, path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be written ({error}); choose another output=DIR."
        ) from error


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and text of a file. Raises CheckpointError where it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"The checkpoint {path} is damaged ({error}); delete it and run the same command again."
        ) from error


def save_model(path: Path, model: nn.Module, details: dict[str, Any]) -> None:
    """Write weights and buffers, tied tensors once, and JSON details."""
    save_tensors(path, _unique(model.state_dict()), {"details": json.dumps(details)})


def load_model(path: Path, model: nn.Module) -> dict[str, Any]:
    """Load strictly and return the details. Raises CheckpointError where names or shapes differ."""
    tensors, metadata = load_tensors(path)
    _load_strictly(path, model, tensors)
    return json.loads(metadata["details"])


def save_training_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, next_step: int, history: Any
) -> None:
    """Write everything that training needs to continue with the same numbers."""
    tensors = {f"model.{name}": t for name, t in _unique(model.state_dict()).items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": t for name, t in state.items()}
    text = json.dumps(dataclasses.asdict(history))
    save_tensors(path, tensors, {"next_step": str(next_step), "history": text})


def load_training_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, history_type: type[T]
) -> tuple[int, T]:
    """Load the saved state into model and optimizer; return the next step and the history."""
    tensors, metadata = load_tensors(path)
    prefix = "model."
    _load_strictly(path, model, {k[len(prefix) :]: t for k, t in tensors.items() if k.startswith(prefix)})
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return int(metadata["next_step"]), history_type(**json.loads(metadata["history"]))


def _unique(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keep only the first name of tensors that share storage (tied embeddings)."""
    seen: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, tensor in tensors.items():
        seen.setdefault((tensor.data_ptr(), tuple(tensor.shape)), name)
    kept = set(seen.values())
    return {name: tensor for name, tensor in tensors.items() if name in kept or tensor.numel() == 0}


def _load_strictly(path: Path, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    expected = _unique(model.state_dict())
    wrong = [f"missing {name}" for name in expected if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in expected]
    wrong += [
        f"{name} has shape {tuple(tensors[name].shape)} instead of {tuple(t.shape)}"
        for name, t in expected.items()
        if name in tensors and tensors[name].shape != t.shape
    ]
    if wrong:
        shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise CheckpointError(
            f"The checkpoint {path} does not fit the model ({shown}); "
            "delete it and run the same command again."
        )
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(tensors[name])
