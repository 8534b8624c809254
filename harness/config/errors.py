"""Turn every user's mistake into one sentence."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

from hydra.errors import (
    CompactHydraException,
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from harness.config.compose import options, unknown


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
            "experiment, size, task and train take names, such as size=125m."
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
            return unknown("configuration key", key.group(1), [str(k) for k in valid])
        if not cause:  # a group that is not in the defaults list, such as arch@foo
            return f"{text.rstrip('.')}."
        return f"{key.group(1)} cannot be set so: {cause}."
    if cause:
        return f"{text.rstrip('.')}: {cause}."
    return f"{text.rstrip('.')}."


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _one_line(text: str) -> str:
    return " ".join(text.split())
