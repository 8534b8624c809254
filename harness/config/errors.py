"""Turn every user's mistake into one sentence."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from hydra.errors import (
    CompactHydraException,
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from harness.config.compose import options, unknown
from harness.config.targets import requirement, text_of


def sentence(error: BaseException) -> str | None:
    """Return the sentence for a mistake of the user's, or None for an error of the program."""
    if isinstance(error, MissingConfigException):
        return _missing(error)
    if isinstance(error, OverrideParseException):
        return f"The override {error.override!r} cannot be read; write it as key=value."
    if isinstance(error, ConfigCompositionException):
        return _composition(error)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value; add {error.full_key}=VALUE."
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key} cannot be used: {_first_line(error)}."
    if isinstance(error, (OmegaConfBaseException, CompactHydraException, HydraException)):
        return f"The configuration cannot be used: {_first_line(error)}."
    if isinstance(error, YAMLError):
        return f"A configuration file cannot be read: {_one_line(str(error))}."
    if isinstance(error, OSError) and error.filename is not None:  # data and caches have their own sentence
        return f"{error.filename} cannot be written or read ({error.strerror}); choose another output=DIR."
    if isinstance(error, OSError):
        return f"{_one_line(str(error))}."
    if isinstance(error, (TypeError, ValueError)) and _is_of_hydras_choices(error):
        return (
            "A number, true, false or null was given where a name was expected; arch, arch@reference, data, "
            "experiment, lineup, size, task and train take names, such as size=125m."
        )
    if isinstance(error, ValueError):
        text = _one_line(str(error))
        return text if text.endswith(".") else f"{text}."
    return None


def _is_of_hydras_choices(error: BaseException) -> bool:
    """Return whether the error arose where Hydra looks up the chosen files, by names that are text."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).parts[-3:] == ("hydra", "_internal", "defaults_list.py")


def _missing(error: MissingConfigException) -> str:
    """Return Hydra's "Could not find 'arch/x'" as a sentence with the valid names."""
    name = error.missing_cfg_file or ""
    if isinstance(name, (list, tuple)):
        name = name[0]
    group, _, option = name.rpartition("/")
    valid = error.options or options(group)
    if valid:
        return unknown(group or "configuration", option, valid)
    return _one_line(str(error))


def _composition(error: ConfigCompositionException) -> str:
    text = _one_line(str(error))
    cause = _first_line(error.__cause__) if error.__cause__ is not None else ""
    key = re.search(r"Could not override '([^']+)'", text)
    if key is not None:
        valid = getattr(error.__cause__, "parent_node", None)
        if "not in struct" in cause and isinstance(valid, DictConfig):
            return _unknown_key("configuration key", key.group(1), [str(k) for k in valid])
        if not cause:  # a group that is not in the defaults list, such as arch@foo
            return f"{text.rstrip('.')}."
        return f"{key.group(1)} cannot be set so: {cause}."
    if cause:
        return f"{text.rstrip('.')}: {cause}."
    return f"{text.rstrip('.')}."


def _unknown_key(what: str, name: str, valid: Iterable[str]) -> str:
    if name == "interleave":
        return (
            "interleave is no setting any more; write archs=[NAME,NAME] or lineup=NAME, which one job times "
            "in turn."
        )
    return unknown(what, name, valid)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _one_line(text: str) -> str:
    return " ".join(text.split())


def validation_sentence(
    error: ValidationError, kind: type[BaseModel], values: Mapping[str, Any], path: str
) -> str:
    """Return one sentence: the full key, its value, what is valid."""
    errors = error.errors(include_url=False)
    first = errors[0]
    cause, location, hint = first["type"], *_field(kind, first["loc"])
    if cause == "extra_forbidden":
        what = f"key of {_key(path, location)}" if location or path else "configuration key"
        return _unknown_key(what, str(first["loc"][-1]), hint.model_fields)
    if cause == "missing" and location == first["loc"]:
        group = location[:-1]
        missing = [str(e["loc"][-1]) for e in errors if e["type"] == cause and e["loc"][:-1] == group]
        return f"{_key(path, group) or 'The configuration'} lacks {', '.join(missing)}."
    if cause == "value_error":
        key, value = _key(path, location), text_of(_value(values, location))
        return str(first["ctx"]["error"]).replace("{key}", key).replace("{value}", value)
    bounds = (first.get("ctx") or {}).keys() & {"gt", "ge", "le"}
    if bounds:  # of one item of a list, too
        location = (*location, *(part for part in first["loc"][len(location) :] if isinstance(part, int)))
        must = {"gt": "be positive", "ge": "not be negative", "le": "lie between 0 and 1"}[bounds.pop()]
    else:
        must = f"be {requirement(_value(values, location), hint)}"
    return f"{_key(path, location)}={text_of(_value(values, location))} must {must}."


def _field(kind: type[BaseModel], location: Sequence[int | str]) -> tuple[tuple[int | str, ...], Any]:
    """Return the part of an error's location that leads to a field, or to a group, and what is annotated
    there. Behind it pydantic names items of lists and members of unions."""
    hint: Any = kind
    for depth, part in enumerate(location):
        group = next((h for h in (hint, *get_args(hint)) if hasattr(h, "model_fields")), None)
        if group is None or part not in group.model_fields:
            return tuple(location[:depth]), group or hint
        hint = group.model_fields[part].annotation
    return tuple(location), hint


def _key(path: str, location: Sequence[int | str]) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return (path + "".join(parts)).removeprefix(".")


def _value(values: Any, location: Sequence[int | str]) -> Any:
    for part in location:
        values = values[part]
    return values
