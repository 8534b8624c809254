"""Check nodes with a `_target_` against the signature of what they name.

Keyword-only constructors are the schema: a key beside a `_target_` must be one of its parameters,
and a value must fit the parameter's annotation.
"""

from __future__ import annotations

import inspect
import logging
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union

import hydra.utils

from harness.config.compose import unknown

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}


def check_targets(node: Any, path: str = "") -> None:
    """Check every `_target_` in `node`: each key beside it must be a parameter and fit its annotation, and
    each required parameter must be given unless the node is `_partial_`.

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
    """Check that `function(**values)` is a possible call. `path` and `name` stand in the sentence.

    Raises ValueError with one sentence."""
    parameters = inspect.signature(function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in values:
            if key not in parameters:
                raise ValueError(unknown(f"key of {path} ({name})", key, list(parameters)))
        needed = [k for k, p in parameters.items() if p.default is p.empty and k != "self"]
        missing = [key for key in needed if key not in values]
        if missing and not is_partial:
            raise ValueError(f"{path} ({name}) lacks {', '.join(missing)}.")
    check_values(values, _hints(function), path)


def check_values(values: Mapping[str, Any], hints: Mapping[str, Any], path: str) -> None:
    """Raise ValueError for the first value that does not fit its hint."""
    for key, value in values.items():
        if key in hints and not fits(value, hints[key]):
            where = f"{path}.{key}" if path else key
            raise ValueError(f"{where}={text_of(value)} must be {requirement(value, hints[key])}.")


def fits(value: Any, hint: Any) -> bool:
    """Return whether a JSON value can stand where `hint` is annotated; true where that cannot be decided."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, Mapping) and "_target_" in value:
        return hint not in WORDS  # an object to be built
    if origin in (Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if hint is None or hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is str:
        return isinstance(value, str)
    container = origin or hint
    if container is Callable:
        return False  # neither a text nor a number can be called
    if container is tuple and arguments and arguments[-1] is not Ellipsis:
        return _is_list(value) and len(value) == len(arguments) and all(map(fits, value, arguments))
    if container in (list, tuple, Sequence):
        return _is_list(value) and all(fits(item, a) for item in value for a in arguments[:1])
    if container in (dict, Mapping):
        return isinstance(value, Mapping) and all(
            fits(item, a) for item in value.values() for a in arguments[1:]
        )
    return True


def requirement(value: Any, hint: Any) -> str:
    """Return in words what `value`, which does not fit `hint`, must be."""
    words = describe(hint)
    return words.replace("a number", "a finite number") if _holds_non_finite(value) else words


def _holds_non_finite(value: Any) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    return _is_list(value) and any(map(_holds_non_finite, value))


def describe(hint: Any) -> str:
    """Return a hint in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in WORDS:
        return WORDS[hint]
    if origin is Annotated:
        return describe(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(describe(a) for a in arguments if not (a is int and float in arguments))
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
    return "a mapping" if hasattr(hint, "model_fields") else getattr(hint, "__name__", str(hint))


def text_of(value: Any) -> str:
    """Return a value as a sentence shows it."""
    return "null" if value is None else repr(value)


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations, or none where they name something that does not exist at run time."""
    try:
        return typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except (NameError, TypeError, AttributeError):
        return {}


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))
