"""Whether a configuration can be used, said in one sentence before anything runs. Imports no torch.

Keyword-only constructors are the schema: a key beside a `_target_` must be one of its parameters,
and a value must fit the parameter's annotation.
"""

from __future__ import annotations

import inspect
import logging
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union

import hydra.utils

from harness.config.compose import resolve as resolve
from harness.config.compose import unknown

#: The root's own keys: what they must be, and what fits.
ROOT_HINTS: dict[str, Any] = {
    "experiment_name": str,
    "output": str,
    "seed": int,
    "device": Literal["auto", "cpu", "cuda"],
    "dtype": Literal["float32", "bfloat16"],
    "num_threads": int | None,
    "num_workers": int,
    "match": Literal["parameters", "none"],
    "interleave": list[str] | None,
    "job_timeout_s": float,
    "retry_failed": bool,
    "implementation": dict[str, str],
}
SIZE_HINTS: dict[str, Any] = {
    "name": str,
    "is_published": bool,
    "vocab_size": int,
    "d_model": int,
    "num_layers": int,
    "num_heads": int,
    "num_kv_heads": int,
    "window_tokens": int,
    "d_ff": int,
}
ARCH_HINTS: dict[str, Any] = {
    "name": str,
    "display_name": str,
    "colour": str,
    "learning_rate": float | None,
    "has_short_convolution": bool | None,
    "match": dict[str, Any] | None,
    "model": dict[str, Any],
}
#: What an architecture may have beside.
OPTIONAL_ARCH_HINTS: dict[str, Any] = {
    "published": list[str],
    "published_model": dict[str, Any],
    "tasks": dict[str, dict[str, Any]],
    "expert_training": dict[str, Any] | None,
}
POSITIVE_KEYS = ("num_threads", "num_workers", "job_timeout_s")

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}


def check_root(config: Mapping[str, Any]) -> None:
    """Checks what every job needs, without importing what the configuration names.

    Raises ValueError with one sentence."""
    _require(config, [*ROOT_HINTS, "size", "reference", "data", "train", "tasks"], "The configuration")
    check_values(config, ROOT_HINTS, "")
    if not isinstance(config["tasks"], Mapping) or not all(
        isinstance(t, Mapping) for t in config["tasks"].values()
    ):
        raise ValueError(
            f"tasks={_shown(config['tasks'])} holds the tasks' settings; choose tasks with task=[NAME]."
        )
    check_values(config, {key: dict[str, Any] for key in ("size", "reference", "data", "train")}, "")
    check_values(config["train"], {"stream": dict[str, Any]}, "train")
    check_values(config["data"], {"corpus": dict[str, Any]}, "data")
    _require(config["size"], [key for key in SIZE_HINTS if key != "is_published"], "size")
    if config["seed"] < 0:
        raise ValueError(f"seed={config['seed']} must not be negative.")
    for key in POSITIVE_KEYS:
        if config[key] is not None and config[key] <= 0:
            raise ValueError(f"{key}={config[key]} must be positive.")
    check_values(config["size"], SIZE_HINTS, "size")
    _check_file_name("size.name", config["size"]["name"])
    for key, value in config["size"].items():
        if SIZE_HINTS.get(key) is int and value < (0 if key == "d_ff" else 1):
            raise ValueError(f"size.{key}={value} must be positive.")
    for group in ("arch", "reference"):
        if config.get(group) is not None:
            _require(config[group], list(ARCH_HINTS), group)
            check_values(config[group], ARCH_HINTS | OPTIONAL_ARCH_HINTS, group)
            _check_file_name(f"{group}.name", config[group]["name"])
            if (config[group]["learning_rate"] is None) != config[group].get("is_pretrained", False):
                shown = _shown(config[group]["learning_rate"])
                raise ValueError(
                    f"{group}.learning_rate={shown} must be a number, or null with is_pretrained=true, "
                    "for a model that is not trained here."
                )
            if config[group]["match"] is not None:
                _require(config[group]["match"], ["key", "step"], f"{group}.match")
                check_values(config[group]["match"], {"step": int}, f"{group}.match")
                if config[group]["match"]["step"] < 1:
                    raise ValueError(f"{group}.match.step={config[group]['match']['step']} must be positive.")
                if config[group]["match"]["key"] not in config[group]["model"]:
                    valid = [k for k in config[group]["model"] if not str(k).startswith("_")]
                    raise ValueError(unknown(f"{group}.match.key", config[group]["match"]["key"], valid))


def _check_file_name(key: str, name: str) -> None:
    if not re.fullmatch(r"[\w+-][\w.+-]*", name):
        raise ValueError(f"{key}={_shown(name)} names files; use letters, digits, _, -, + and . alone.")


def check_targets(node: Any, path: str = "") -> None:
    """Every key beside a `_target_` must be a parameter of it and fit its annotation, and every
    required one be there unless the node is `_partial_`.

    Raises ValueError with one sentence that names the mistake and the valid choices."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            _check_target(node, path)
        for key, item in node.items():
            check_targets(item, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, item in enumerate(node):
            check_targets(item, f"{path}[{index}]")


def _check_target(node: Mapping[str, Any], path: str) -> None:
    target = str(node["_target_"])
    logging.getLogger(hydra.utils.__name__).disabled = True  # it prints what is raised below
    try:
        function = hydra.utils.get_method(target) if "." in target else None
    except Exception as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"{path}._target_={target!r} cannot be imported: {reason}.") from error
    if function is None:
        raise ValueError(f"{path}._target_={target!r} must be a dotted path such as archs.decoder.Decoder.")
    values = {str(key): value for key, value in node.items() if not str(key).startswith("_")}
    check_call(function, values, path, target, is_partial=bool(node.get("_partial_", False)))


def check_call(
    function: Callable[..., Any], values: Mapping[str, Any], path: str, name: str, *, is_partial: bool = False
) -> None:
    """Whether `function(**values)` is a possible call. `path` and `name` are for the sentence."""
    parameters = inspect.signature(function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in values:
            if key not in parameters:
                raise ValueError(unknown(f"key of {path} ({name})", key, list(parameters)))
        needed = [k for k, p in parameters.items() if p.default is p.empty and k != "self"]
        if not is_partial:
            _require(values, needed, f"{path} ({name})")
    check_values(values, _hints(function), path)


def check_values(values: Mapping[str, Any], hints: Mapping[str, Any], path: str) -> None:
    """Raises ValueError for the first value that does not fit its hint."""
    for key, value in values.items():
        if key in hints and not fits(value, hints[key]):
            where = f"{path}.{key}" if path else key
            raise ValueError(f"{where}={_shown(value)} must be {describe(hints[key])}.")


def fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value can stand where `hint` is annotated; true where that cannot be told."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, Mapping) and "_target_" in value:
        return hint not in _WORDS  # an object to be built
    if origin in (Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if hint is None or hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    container = origin or hint
    if container is Callable:
        return False  # a text or a number is nothing to call
    if container is tuple and arguments and arguments[-1] is not Ellipsis:
        return _is_list(value) and len(value) == len(arguments) and all(map(fits, value, arguments))
    if container in (list, tuple, Sequence):
        return _is_list(value) and all(fits(item, a) for item in value for a in arguments[:1])
    if container in (dict, Mapping):
        return isinstance(value, Mapping) and all(
            fits(item, a) for item in value.values() for a in arguments[1:]
        )
    return True


def describe(hint: Any) -> str:
    """A hint in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _WORDS:
        return _WORDS[hint]
    if origin in (Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)}, each {describe(arguments[0])}"
    if (origin or hint) in (list, tuple, Sequence):
        return "a list" + (f", each item {describe(arguments[0])}" if arguments else "")
    if (origin or hint) is Callable:
        return "a mapping with a _target_ to call"
    if (origin or hint) in (dict, Mapping):
        is_named = len(arguments) > 1 and arguments[1] is not Any
        return "a mapping" + (f", each value {describe(arguments[1])}" if is_named else "")
    return getattr(hint, "__name__", str(hint))


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations, or none of them where they name what is not there at run time."""
    try:
        return typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except (NameError, TypeError, AttributeError):
        return {}


def _require(values: Mapping[str, Any], keys: Sequence[str], path: str) -> None:
    missing = [key for key in keys if key not in values]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}.")


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)
