"""Compose a configuration from conf/ and resolve its interpolations. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError

CONFIG_DIR = str(Path(__file__).resolve().parents[2] / "conf")

#: The groups of the configuration that have a `model`.
MODEL_GROUPS = ("arch", "reference")


def register_resolvers() -> None:
    """Register the functions of the YAML files.

    `${times:2,${size.num_layers}}`: a product. `${multiple:16,${size.vocab_size}}`: the value rounded up to a
    multiple of 16. `${join:${data.domains},[needle]}`: a list of both lists. `${basename:${arch.path}}`: the
    last part of a path.
    """

    def join(*lists: list[Any]) -> list[Any]:
        return [item for part in lists for item in part]

    def basename(path: str) -> str:
        return PurePath(path).name or str(path)

    OmegaConf.register_new_resolver("basename", basename, replace=True)
    OmegaConf.register_new_resolver("times", lambda a, b: a * b, replace=True)
    OmegaConf.register_new_resolver("multiple", lambda step, value: -(-value // step) * step, replace=True)
    OmegaConf.register_new_resolver("join", join, replace=True)


def resolve(config: DictConfig) -> dict[str, Any]:
    """Return plain, fully interpolated data.

    Raises ValueError where the training recipe has no values for the size, and OmegaConf's own error for
    another interpolation that has no value.

    Settings of tasks that are not chosen are left out. At a size with `is_published` an architecture's
    `published_model` stands in place of its `model`."""
    try:
        value = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except InterpolationKeyError:
        _check_recipe(config)
        raise
    assert isinstance(value, dict)
    resolved = {"tasks": {}} | {str(key): item for key, item in value.items()}
    if isinstance(resolved["tasks"], dict):
        resolved["tasks"] = {k: task for k, task in resolved["tasks"].items() if not _is_left_out(k, task)}
    for group in MODEL_GROUPS:
        is_replaced = _is_replaced(resolved, group)
        published = (resolved.get(group) or {}).pop("published_model", None)
        if is_replaced:
            resolved[group]["model"] = published
    return resolved


def _is_left_out(name: str, task: Any) -> bool:
    """Return whether an experiment has settings for a task of the project that `task=` does not choose."""
    return isinstance(task, dict) and "_target_" not in task and name in options("task")


def _check_recipe(config: DictConfig) -> None:
    """Raise ValueError where `train` takes values from its `by_size`, which has none for this size."""
    train, size = config.get("train") or {}, OmegaConf.select(config, "size.name")
    sizes = train.get("by_size")
    if sizes is None or size in sizes:
        return
    raw: Any = OmegaConf.to_container(train, resolve=False)
    taken = [key for key, value in raw.items() if isinstance(value, str) and "train.by_size[" in value]
    needed = ", ".join(f"train.{key}=VALUE" for key in taken)
    raise ValueError(
        f"train={train.get('name')} has no values for size={size}; choose one of its sizes "
        f"({', '.join(sizes)}) or set {needed}."
    )


def check_model_overrides(config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Raise ValueError where one of `overrides` (the command line's `key=value`) changes the one of `model`
    and `published_model` that `resolve` leaves out at this size, and so would change nothing."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        group, _, rest = override.key_or_group.partition(".")
        key, _, path = rest.partition(".")
        if group not in MODEL_GROUPS or key not in ("model", "published_model"):
            continue
        used = "published_model" if _is_replaced(config, group) else "model"
        if key != used:
            name = ".".join([group, used, *([path] if path else [])])
            raise ValueError(
                f"{override.input_line} changes nothing at size={config['size']['name']}, where the model of "
                f"{group}={config[group]['name']} is {group}.{used}; set {name} instead."
            )


def _is_replaced(config: Mapping[str, Any], group: str) -> bool:
    """Return whether the group's `published_model` stands in place of its `model` at this size."""
    has_one = (config.get(group) or {}).get("published_model") is not None
    return has_one and bool((config.get("size") or {}).get("is_published", False))


def options(group: str) -> list[str]:
    """Return the names that the project itself has in a configuration group."""
    return [path.stem for path in Path(CONFIG_DIR, group).glob("*.yaml")]


def unknown(what: str, name: str, valid: Iterable[str]) -> str:
    """Return one sentence: the unknown name, the nearest valid one, all valid ones."""
    names = sorted(valid)
    near = difflib.get_close_matches(name.rpartition(".")[2], names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"Unknown {what}: {name!r}.{hint} Valid: {', '.join(names)}."


def compose_config(overrides: list[str], config_dir: str | None = None) -> DictConfig:
    """Return the configuration that the command line `python -m harness *overrides` composes.

    config_dir: a further folder of YAML files, as --config-dir gives.
    Raises ValueError where an override of a model changes nothing; see check_model_overrides.
    """
    register_resolvers()
    GlobalHydra.instance().clear()
    if config_dir is not None:
        overrides = [*overrides, f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"]
    with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        config = compose("config", overrides)
    check_model_overrides(config, overrides)
    return config
