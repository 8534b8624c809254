"""Where the configuration is and how its interpolations compute. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

from omegaconf import DictConfig, OmegaConf

CONFIG_DIR = str(Path(__file__).resolve().parent.parent / "conf")


def register_resolvers() -> None:
    """`${times:2,${size.num_layers}}`, `${multiple:16,${size.vocab_size}}` (the value rounded up to a
    multiple of 16), `${join:${data.domains},[needle]}` (a list of both lists),
    `${comma:${interleave},"[]"}` (text for Hydra's sweeper) and `${basename:${arch.path}}` (the last part
    of a path) in the YAML files."""

    def join(*lists: list[Any]) -> list[Any]:
        return [item for part in lists for item in part]

    def comma(names: list[str], *more: str) -> str:
        return ",".join([*names, *more])

    def basename(path: str) -> str:
        return PurePath(path).name or str(path)

    OmegaConf.register_new_resolver("basename", basename, replace=True)
    OmegaConf.register_new_resolver("times", lambda a, b: a * b, replace=True)
    OmegaConf.register_new_resolver("multiple", lambda step, value: -(-value // step) * step, replace=True)
    OmegaConf.register_new_resolver("join", join, replace=True)
    OmegaConf.register_new_resolver("comma", comma, replace=True)


def resolve(config: DictConfig) -> dict[str, Any]:
    """Plain, fully interpolated data; raises ValueError naming an unresolved interpolation.

    At a size with `is_published` an architecture's `published_model` stands in place of its `model`."""
    value = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(value, dict)
    resolved = {"tasks": {}} | {str(key): item for key, item in value.items()}
    is_published = (resolved.get("size") or {}).get("is_published", False)
    for group in ("arch", "reference"):
        published = (resolved.get(group) or {}).pop("published_model", None)
        if is_published and published is not None:
            resolved[group]["model"] = published
    return resolved


def options(group: str) -> list[str]:
    """The names that the project itself has in a configuration group."""
    return [path.stem for path in Path(CONFIG_DIR, group).glob("*.yaml")]


def unknown(what: str, name: str, valid: Iterable[str]) -> str:
    """One sentence: what is unknown, the nearest valid name, all valid names."""
    names = sorted(valid)
    near = difflib.get_close_matches(name.rpartition(".")[2], names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"Unknown {what}: {name!r}.{hint} Valid: {', '.join(names)}."
