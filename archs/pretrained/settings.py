"""Reads the values of a published config.json by type, with a sentence for each that does not fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

REQUIRED = object()


class Settings:
    """Reads config.json's values by type. Every error is a ValueError of one sentence that names the
    setting and its value; `prefix` is put before the names of a section's settings."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self.values, self.prefix = values, prefix

    def whole(self, name: str, default: Any = REQUIRED) -> Any:
        """Return a whole number; None only as a default, and where the value is null and has a default."""
        return self._read(
            name, default, "a whole number below 2^31", lambda v: isinstance(v, int) and abs(v) < 2**31
        )

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        return self._read(
            name, default, "a number", lambda v: isinstance(v, (int, float)) and math.isfinite(v)
        )

    def flag(self, name: str, default: Any = REQUIRED) -> Any:
        return self._read(name, default, "true or false", lambda v: isinstance(v, bool), is_flag=True)

    def range(self, name: str, default: Any = REQUIRED) -> Any:
        """Two numbers."""

        def is_range(value: Any) -> bool:
            return (
                isinstance(value, (list, tuple))
                and len(value) == 2
                and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
            )

        return self._read(name, default, "two numbers", is_range)

    def section(self, name: str) -> Settings:
        """Return a mapping, empty where it is null or not there."""
        value = self._read(name, None, "a mapping", lambda v: isinstance(v, Mapping))
        return Settings({} if value is None else value, f"{self.prefix}{name}.")

    def expect(self, name: str, supported: tuple[Any, ...], default: Any) -> None:
        """Refuse every value except the supported ones."""
        value = self.values.get(name, default)
        if not any(value == known and type(value) is type(known) for known in supported):
            choices = " or ".join("null" if known is None else repr(known) for known in supported)
            raise ValueError(
                f"{self.prefix}{name}={value!r} changes the model's numbers and is not supported; "
                f"choose a checkpoint whose {self.prefix}{name} is {choices}"
            )

    def _read(
        self, name: str, default: Any, wanted: str, fits: Callable[[Any], bool], *, is_flag: bool = False
    ) -> Any:
        if name not in self.values and default is REQUIRED:
            raise ValueError(
                f"{self.prefix}{name} is missing; use the config.json that belongs to the weights"
            )
        value = self.values.get(name, default)
        if value is None and default is not REQUIRED:
            return default
        if value is default:
            return default
        if not fits(value) or isinstance(value, bool) != is_flag:
            raise ValueError(f"{self.prefix}{name}={value!r} must be {wanted}")
        return value
