"""Compiles our Triton kernels for a GPU that need not be here: `python -m harness.peers.compile [ARCH ...]`.

Every model of the H200 experiments that has kernels of ours is built with one layer, on tensors without
content (torch's FakeTensorMode), and trained, prefilled and decoded through its public calls, as the
experiments do it; Transformer² is left out, whose kernels are its base's. Beside them stand the calls
that `harness.peers.kernels` times, unless architectures or a size are named. Each launch of a kernel of ours
is compiled for the card instead of run, so that arguments and types are those of real launches and nobody
writes them by hand. Of each model that is one batch and one length: what Triton compiles anew for another
grid or for an argument of 1 is not among them. A line a binary, under the first call that needs it:
registers a thread, bytes of spills (stores and loads), bytes of shared memory. Exit status 1 where one does
not compile or needs
more shared memory than a block has, or a model ends in an error, else 0. Compiling everything takes ten
minutes or more; Triton's cache makes the second time quick.

What it is not: a run. Tensors claim to be on a GPU (is_cuda), yet their device is "cpu", so autocast goes by
its list for CPUs, and all pointers count as aligned to 16 bytes. What it takes hold of in Triton
(JITFunction's run, the active driver, a compiled kernel's asm and metadata) is not a public interface: it was
tried with Triton 3.6 and 3.7. The driver is replaced for the life of the process.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from harness.config.build import build_model, resolve
from harness.config.compose import compose_config
from harness.peers.cases import LINES
from harness.peers.operations import KERNELS, timed_call
from harness.train.loop import autocast

#: Experiment and size: the shapes of the papers, and the models that are trained from scratch.
MODELS = (("h200_latency", "125m"), ("h200_latency", "1.3b"), ("h200_quality", "small"))

#: Calls of prefill: whole chunks of every architecture, then two that begin or end inside one. Then decode
#: steps, over the end of the longest chunk.
PREFILLS_TOKENS, NUM_STEPS = (1024, 13, 40), 70

#: Bytes of shared memory that a block may have, by compute capability (CUDA C++ Programming Guide, "Technical
#: specifications per compute capability"). Triton learns of too much only when it loads a binary on a card.
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}

#: What kernels ask of the card: an H200's streaming multiprocessors, which only sizes the grid.
PROPERTIES = {"multi_processor_count": 132}

#: Of the cards that our kernels are meant for: Ampere, Ada, Hopper, Blackwell.
CAPABILITIES = (80, 86, 89, 90, 100, 120)

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One launch's binary, or why there is none. kernel: its name with the values of its constants."""

    kernel: str
    registers: int | None = None
    shared_bytes: int | None = None
    spill_bytes: int | None = None
    error: str | None = None


class _NoDevice:
    """Stands for torch.cuda.device, which there may be none of."""

    def __init__(self, *arguments: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *exception: Any) -> None: ...


@contextmanager
def compiled_instead_of_run(capability: int) -> Iterator[list[Compiled]]:
    """Within, kernels take fake tensors on a CPU, and their launches compile and compute nothing. The list
    grows by one for each new binary and each failure."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    jit = importlib.import_module("triton.runtime.jit")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", capability, 32)
    importlib.import_module("triton.runtime").driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device=None: 0,
            get_current_target=lambda: target,
        )
    )
    launch, found, seen = jit.JITFunction.run, [], set()

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        del warmup
        name = _name(self, arguments, options)
        try:
            typed = [_without_content(value, jit) for value in arguments]
            named = {key: _without_content(value, jit) for key, value in options.items()}
            binary = launch(self, *typed, grid=grid, warmup=True, **named)
            if binary.hash not in seen:
                seen.add(binary.hash)
                found.append(_measured(name, binary, capability))
        except Exception as error:  # the other kernels are worth knowing
            if (name, str(error)) not in seen:
                seen.add((name, str(error)))
                found.append(Compiled(kernel=name, error=f"{type(error).__name__}: {error}"))

    with ExitStack() as replaced:
        for patch in (
            mock.patch.object(jit.JITFunction, "run", compile_only),
            mock.patch.object(Tensor, "is_cuda", property(lambda self: True), create=True),
            mock.patch("torch.cuda.device", _NoDevice),
            mock.patch("torch.cuda.device_of", _NoDevice),
            mock.patch("torch.cuda.get_device_properties", lambda *_: SimpleNamespace(**PROPERTIES)),
            mock.patch("archs.ops.operation.Operation.why_unavailable", lambda *arguments: None),
            FakeTensorMode(),
        ):
            replaced.enter_context(patch)
        yield found


def _without_content(value: Any, jit: Any) -> Any:
    return jit.MockTensor(value.dtype) if isinstance(value, Tensor) else value


def _name(function: Any, arguments: Sequence[Any], options: dict[str, Any]) -> str:
    """Return the kernel, the types of its tensors and its constants, which tell one binary from another."""
    given = {**dict(zip(function.arg_names, arguments, strict=False)), **options}
    constants = [f"{p.name}={given[p.name]}" for p in function.params if p.is_constexpr and p.name in given]
    dtypes = dict.fromkeys(str(v.dtype).split(".")[-1] for v in given.values() if isinstance(v, Tensor))
    module = function.fn.__module__.removeprefix("archs.ops.").replace(".kernel", "", 1)
    return f"{module}.{function.fn.__name__} {'/'.join(dtypes)} {' '.join(constants)}"


def _measured(name: str, binary: Any, capability: int) -> Compiled:
    """Return what ptxas prints about the kernel that Triton handed it."""
    tools = importlib.import_module("triton.knobs").nvidia
    ptxas = (tools.ptxas_blackwell if capability >= 100 else tools.ptxas).path
    ptx = binary.asm["ptx"]
    architecture = re.search(r"\.target\s+(\w+)", ptx)
    assert architecture is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        options = ["-v", f"--gpu-name={architecture[1]}", str(path), "-o", os.devnull]
        said = subprocess.run([ptxas, *options], check=True, capture_output=True, text=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.findall(r"(\d+) bytes spill", said)
    shared_bytes = binary.metadata.shared
    is_too_large = shared_bytes > SHARED_BYTES.get(capability, shared_bytes)
    return Compiled(
        kernel=name,
        error=f"a block of this card has less than {shared_bytes} bytes shared" if is_too_large else None,
        registers=None if registers is None else int(registers[1]),
        shared_bytes=shared_bytes,
        spill_bytes=sum(map(int, spills)),
    )


def model_config(arch: str, experiment: str, size: str) -> dict[str, Any]:
    """Return the model's configuration with one layer, resolved."""
    chosen = [f"arch={arch}", f"experiment={experiment}", f"size={size}"]
    return resolve(compose_config([*chosen, "match=none", "size.num_layers=1"]))["arch"]["model"]


def has_kernels(config: dict[str, Any]) -> bool:
    """Return whether a model has an implementation of ours in Triton, and no other model as its base."""
    return "triton" in str(config) and "base" not in config


def run_model(config: dict[str, Any]) -> None:
    """Train, prefill and decode one layer of a model: with weights in bfloat16, and with weights in
    float32 under autocast, as training from scratch has them."""
    before = torch.get_default_dtype()
    for dtype in (torch.bfloat16, torch.float32):
        torch.set_default_dtype(dtype)  # a fake parameter's dtype cannot be changed later
        try:
            model = build_model(config)
        finally:
            torch.set_default_dtype(before)
        tokens = torch.zeros(2, PREFILLS_TOKENS[0] + 1, dtype=torch.int64)
        with autocast(CPU, torch.bfloat16 if dtype == torch.float32 else torch.float32):
            model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
            with torch.no_grad():
                state = model.init_state(1, sum(PREFILLS_TOKENS) + 2 * NUM_STEPS)
                for num_tokens in PREFILLS_TOKENS:
                    _, state = model.prefill(tokens[:1, :num_tokens], state)
                for _ in range(NUM_STEPS):
                    _, state = model.decode(tokens[:1, 0], state)
                    position = torch.full((1,), state.num_tokens)
                    _, state = model.decode_at(tokens[:1, 0], state, position)


def run_lines() -> None:
    """Yield the calls of our kernels that `harness.peers.kernels` times, on inputs of its sizes in
    bfloat16."""
    for line in LINES.values():
        if line.implementation == "triton":
            kernel = KERNELS[line.kernel]
            inputs = kernel.inputs(line.sizes, CPU, torch.bfloat16)
            run = kernel.bound(line.sizes, line.implementation)
            timed_call(run, inputs, is_training=line.is_training)()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line per binary. 0 where everything compiled, 1 where something did not, 2 on a mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.peers.compile", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "archs", nargs="*", metavar="ARCH", help="of h200_latency's architectures; default all of them"
    )
    parser.add_argument(
        "--capability", type=int, default=90, choices=CAPABILITIES, help="of the card, default 90: Hopper"
    )
    parser.add_argument("--size", help="this size alone, of " + ", ".join(size for _, size in MODELS))
    given = parser.parse_args(arguments)
    models = [model for model in MODELS if given.size in (None, model[1])]
    try:
        if not models:
            raise ValueError(f"--size {given.size} is none of {', '.join(size for _, size in MODELS)}.")
        if importlib.util.find_spec("triton") is None:
            raise ValueError("triton is not installed; run pip install 'longarch[kernels]'.")
        if os.environ.get("TRITON_INTERPRET") == "1":
            raise ValueError("TRITON_INTERPRET=1 has kernels interpreted, not compiled; unset it.")
        known = list(resolve(compose_config(["experiment=h200_latency"]))["archs"])
        for arch in given.archs:
            if arch not in known:
                raise ValueError(f"h200_latency has no arch {arch!r}; choose of {', '.join(sorted(known))}.")
        chosen = [(arch, *model) for model in models for arch in given.archs or known]
        configs = {f"{arch} {size}": model_config(arch, name, size) for arch, name, size in chosen}
        configs = {name: config for name, config in configs.items() if has_kernels(config)}
        if not configs:
            raise ValueError(f"{', '.join(given.archs)} has no Triton kernel of ours; choose another arch.")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    calls: list[tuple[str, Callable[[], None]]] = []
    if given.size is None and not given.archs:
        calls.append(("harness.peers.kernels", run_lines))
    calls += [(name, functools.partial(run_model, config)) for name, config in configs.items()]
    num_printed = 0
    with compiled_instead_of_run(given.capability) as found:
        for name, call in calls:
            try:
                call()
            except Exception as error:
                found.append(Compiled(kernel="the call", error=f"{type(error).__name__}: {error}"))
            for compiled in found[num_printed:]:
                print(f"{name:<18}{_text(compiled)}", flush=True)
            num_printed = len(found)
    num_errors = sum(compiled.error is not None for compiled in found)
    print(f"{len(found) - num_errors} binaries, {num_errors} errors")
    return 0 if num_errors == 0 else 1


def _text(compiled: Compiled) -> str:
    if compiled.error is not None:
        return f"FAILED: {compiled.kernel}: {compiled.error}"
    return (
        f"{compiled.registers!s:>4} registers {compiled.spill_bytes:>6} B spilled "
        f"{compiled.shared_bytes:>7} B shared  {compiled.kernel}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
