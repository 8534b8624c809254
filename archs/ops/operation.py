"""Operations and their implementations: names, checks, and the choice of one."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


class ImplementationUnavailable(ValueError):
    """An implementation was chosen that is not known, not installed or cannot run here."""


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """The place of a function, and its needs.

    target:       "module:function", imported on first use.
    devices:      device types it runs on.
    requires:     an importable package it needs, or None.
    install_hint: what to type when the package is missing.
    """

    target: str
    devices: Sequence[str] = ("cpu", "cuda")
    requires: str | None = None
    install_hint: str = ""

    @property
    def is_triton(self) -> bool:
        """True for a kernel of ours."""
        return self.requires == "triton"


def triton_kernel(target: str) -> Implementation:
    """Our own kernel: a function around Triton, at "module:function". It runs on a CPU too where
    TRITON_INTERPRET=1 has Triton interpret it, which is for tests: a run's header says so. No GPU has run
    one of ours yet, so no operation's `auto` names it."""
    hint = "pip install 'longarch[kernels]'"
    return Implementation(target=target, devices=("cuda",), requires="triton", install_hint=hint)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A named operation. `auto` lists, for each device type, the names to prefer in order."""

    name: str
    implementations: Mapping[str, Implementation]
    auto: Mapping[str, Sequence[str]]

    def check_name(self, name: str) -> None:
        """Raise ImplementationUnavailable where `name` is neither `auto` nor an implementation's."""
        if name not in ("auto", *self.implementations):
            valid = ", ".join(["auto", *self.implementations])
            raise ImplementationUnavailable(
                f"{self.name} has no implementation {name!r}; choose one of {valid}."
            )

    def why_unavailable(self, name: str, device: torch.device) -> str | None:
        """Return a sentence that says what is missing, or None where `name` can run on `device`."""
        implementation = self.implementations[name]
        is_interpreted = implementation.is_triton and os.environ.get("TRITON_INTERPRET") == "1"
        if device.type not in implementation.devices and not (is_interpreted and device.type == "cpu"):
            needed = " or ".join(implementation.devices)
            text = (
                f"implementation {name!r} of {self.name} runs on {needed} only, not on {device.type}; "
                f"choose device={implementation.devices[0]} or another implementation"
            )
            if implementation.requires is None or _is_installed(implementation.requires):
                return f"{text}."
            return f"{text}; there it also needs: {implementation.install_hint}."
        if implementation.requires is not None and not _is_installed(implementation.requires):
            return (
                f"implementation {name!r} of {self.name} needs the package {implementation.requires}, "
                f"which is not installed; run {implementation.install_hint}."
            )
        return None

    def resolve(self, name: str, device: torch.device) -> str:
        """Return the name that will run: `auto` becomes the first preference available on `device`.

        Raises ImplementationUnavailable with one sentence."""
        if name == "auto":
            for candidate in self.auto[device.type]:
                if self.why_unavailable(candidate, device) is None:
                    return candidate
            raise ImplementationUnavailable(f"{self.name} has no implementation for {device.type}.")
        self.check_name(name)
        why = self.why_unavailable(name, device)
        if why is not None:
            raise ImplementationUnavailable(why)
        return name

    def function(self, name: str, device: torch.device) -> Callable:
        """Return the callable behind `name` or `auto` on `device`.

        Raises as `resolve`, and where the package that it needs is installed and broken."""
        return self._load(self.resolve(name, device))

    def _load(self, name: str) -> Callable:
        implementation = self.implementations[name]
        try:
            return _load(implementation.target)
        except ImportError as error:
            if implementation.requires is None:
                raise
            raise ImplementationUnavailable(
                f"implementation {name!r} of {self.name} cannot be imported ({error}); install "
                f"{implementation.requires} anew: {implementation.install_hint}."
            ) from error

    def function_and_inputs(
        self, name: str, inputs: Sequence[Tensor], dtype: torch.dtype
    ) -> tuple[Callable, list[Tensor]]:
        """`function` for the device of `inputs`, and these in `dtype`, that of the arithmetic; a kernel of
        ours reads them in their own."""
        name = self.resolve(name, inputs[0].device)
        if not self.implementations[name].is_triton:
            inputs = [tensor.to(dtype) for tensor in inputs]
        return self._load(name), list(inputs)


@cache
def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@cache
def _load(target: str) -> Callable:
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)
