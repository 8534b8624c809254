"""The folder of a published checkpoint: where it is, its JSON files, the tensors in its safetensors files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HUB = "hub:"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@cache
def local_folder(path: str) -> Path:
    """Return the folder itself, or that of hub:OWNER/NAME or hub:OWNER/NAME@REVISION in the hub's cache,
    fetched where it is not there. Raises ValueError where the hub or its package is out of reach."""
    if not path.startswith(HUB):
        return Path(path).expanduser().absolute()
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(
            f"{path} needs the package huggingface_hub, which is not installed; "
            "run pip install 'longarch[huggingface]', or give the folder of a checkpoint."
        ) from None
    name, _, revision = path.removeprefix(HUB).partition("@")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision or None, allow_patterns=[CONFIG, "model*.safetensors", INDEX]
            )
        )
    except Exception as error:  # the network, the hub and the cache have errors of their own
        raise ValueError(
            f"{path} cannot be had from the hub ({one_line(error)}); give the folder of a checkpoint."
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raises ValueError, one sentence, where there is none."""
    try:
        # Some releases of transformers write an infinity as {"__float__": "Infinity"}.
        values = json.loads(
            path.read_text(encoding="utf-8"),
            object_hook=lambda v: float(v["__float__"]) if set(v) == {"__float__"} else v,
        )
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read as JSON ({one_line(error)}); fetch the checkpoint again."
        ) from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object; fetch the checkpoint again.")
    return values


def tensor_files(folder: Path) -> dict[str, Path]:
    """Published name of every tensor in the folder's safetensors files -> its file.

    Raises ValueError where there are none, pickles alone, or the shards and their index disagree."""
    if (folder / WEIGHTS).is_file():
        return dict.fromkeys(tensor_shapes(folder / WEIGHTS), folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"{folder} holds weights as pickles alone ({', '.join(pickles)}), which can run code when "
                f"they are read; convert them to {WEIGHTS}."
            )
        raise ValueError(
            f"{folder} holds neither {WEIGHTS} nor {INDEX}; give the folder of a whole checkpoint."
        )
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(shard, str) for shard in index.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map of names; fetch the checkpoint again.")
    files: dict[str, Path] = {}
    for shard in sorted(set(index.values())):
        if Path(shard).name != shard:
            raise ValueError(f"{folder / INDEX} names {shard!r}, which is not a file beside it.")
        for name in tensor_shapes(folder / shard):
            if name in files:
                raise ValueError(
                    f"{name} is both in {files[name]} and in {folder / shard}; fetch the checkpoint again."
                )
            files[name] = folder / shard
    lost = [f"{name} in {shard}" for name, shard in index.items() if files.get(name) != folder / shard]
    if lost:
        raise ValueError(
            f"{folder / INDEX} names tensors that are not where it says ({', '.join(lost)}); "
            "fetch the checkpoint again."
        )
    return files


def _damaged(path: Path, error: Exception) -> ValueError:
    if not path.is_file():
        return ValueError(f"{path} is missing; fetch the checkpoint again.")
    return ValueError(f"{path} is damaged ({one_line(error)}); fetch the checkpoint again.")


def tensor_shapes(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> shape and dtype of every tensor in a file; reads its header alone."""
    try:
        with safe_open(path, "pt") as file:
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, not a mapping
            return {name: (tuple(v.get_shape()), v.get_dtype()) for name, v in views.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from None


def read_tensors(path: Path, wanted: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Our name and tensor of each of `wanted`, our name -> published name, one at a time."""
    try:
        with safe_open(path, "pt") as file:
            for ours, name in wanted.items():
                yield ours, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None


def one_line(error: Exception) -> str:
    """Return an error's text without line breaks and without its last full stop."""
    return " ".join(str(error).split()).rstrip(".")
