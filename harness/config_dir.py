"""Where the configuration is and how its interpolations compute. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

from omegaconf import OmegaConf

CONFIG_DIR = str(Path(__file__).resolve().parent.parent / "conf")


def register_resolvers() -> None:
    """`${times:2,${size.num_layers}}`, `${join:${data.domains},[needle]}` (a list of both lists),
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
    OmegaConf.register_new_resolver("join", join, replace=True)
    OmegaConf.register_new_resolver("comma", comma, replace=True)


def options(group: str) -> list[str]:
    """The names that the project itself has in a configuration group."""
    return [path.stem for path in Path(CONFIG_DIR, group).glob("*.yaml")]


def unknown(what: str, name: str, valid: Iterable[str]) -> str:
    """One sentence: what is unknown, the nearest valid name, all valid names."""
    names = sorted(valid)
    near = difflib.get_close_matches(name.rpartition(".")[2], names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"Unknown {what}: {name!r}.{hint} Valid: {', '.join(names)}."
