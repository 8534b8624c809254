"""Every user's mistake ends in one sentence."""

from __future__ import annotations

import re
from pathlib import Path

from hydra.errors import (
    CompactHydraException,
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf.errors import OmegaConfBaseException

from harness.config_dir import unknown


def sentence(error: BaseException) -> str | None:
    """The sentence for a mistake of the user's, or None where the error is the program's own."""
    if isinstance(error, MissingConfigException):
        return _missing(error)
    if isinstance(error, OverrideParseException):
        return f"The override {error.override!r} is not of the form key=value: {_first_line(error)}."
    if isinstance(error, ConfigCompositionException):
        return _composition(error)
    if isinstance(error, (OmegaConfBaseException, CompactHydraException, HydraException)):
        return f"The configuration cannot be used: {_first_line(error)}."
    if isinstance(error, PermissionError):
        return f"{error.filename} cannot be written or read (permission denied); choose another output=DIR."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    if isinstance(error, ValueError):
        return _one_line(str(error))
    return None


def _missing(error: MissingConfigException) -> str:
    """Hydra's "Could not find 'arch/x'" with its list of options."""
    name = error.missing_cfg_file or ""
    if isinstance(name, (list, tuple)):
        name = name[0]
    if error.options:
        group, _, option = name.rpartition("/")
        return unknown(group or "name", option, list(error.options))
    return _one_line(str(error))


def _composition(error: ConfigCompositionException) -> str:
    text = _one_line(str(error))
    cause = _first_line(error.__cause__) if error.__cause__ is not None else ""
    key = re.search(r"Could not override '([^']+)'", text)
    if key is not None:
        valid = getattr(error.__cause__, "parent_node", None)
        if "not in struct" in cause or "is not in struct" in text:
            options = [str(k) for k in valid] if valid is not None and hasattr(valid, "keys") else []
            return unknown("configuration key", key.group(1), options) if options else f"{text}."
        return f"{key.group(1)} cannot be set so: {cause}."
    group = re.search(r"In '[^']+': Could not find '([^']+)'", text)
    if group is not None:
        return f"{text}."
    return text if text.endswith(".") else f"{text}."


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _one_line(text: str) -> str:
    return " ".join(text.split())


def relative(path: Path) -> str:
    """A path as the user would type it from the current folder."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
