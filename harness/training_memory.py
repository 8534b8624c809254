"""Peak memory of one training step by sequence length: `python -m harness.training_memory size=tiny`.

One sequence, forward and backward, at each length, for every architecture of the project or for the one that
arch=NAME names. The last line of the output is one JSON object: architecture -> length -> bytes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from archs.base import SequenceModel
from archs.implementations import resolve_implementations
from harness.config.build import build_model, checked_job
from harness.config.compose import CONFIG_DIR, compose_config, options, resolve
from harness.config.errors import sentence
from harness.config.match import matched_model_config
from harness.config.schema import JobConfig
from harness.measure.memory import PeakMemory
from harness.record.command import CommandRecords
from harness.record.environment import choose_device, describe
from harness.record.identity import timed_identity
from harness.record.metrics import Metric
from harness.train.loop import autocast

LENGTHS_TOKENS = (2048, 8192)

#: The number of a "training_memory" point; its cell is the length of the sequence.
METRICS = (
    Metric(
        name="peak_memory_bytes",
        label="peak memory of a training step",
        unit="bytes",
        direction="lower",
        kind="cost",
        is_headline=True,
    ),
)


def training_peak_bytes(
    model: SequenceModel, num_tokens: int, *, device: torch.device, dtype: torch.dtype = torch.float32
) -> int:
    """Return the bytes of `harness.measure.memory.PeakMemory` over the loss of one sequence of num_tokens
    random tokens and its gradients, the parameters' own gradients included, the parameters not. `device` is a
    CPU or a GPU."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.vocab_size, (1, num_tokens + 1), generator=generator).to(device)
    model.zero_grad(set_to_none=True)
    with PeakMemory(device) as peak:
        with autocast(device, dtype):
            loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
    assert peak.bytes is not None
    return peak.bytes


def measure(arch: str, overrides: Sequence[str], lengths_tokens: Sequence[int]) -> dict[int, int]:
    """Return length -> peak bytes of an architecture as `overrides` configure it; with output=FOLDER among
    them, write points into FOLDER/records.

    Raises ValueError for a user's mistake."""
    resolved = resolve(compose_config([*overrides, f"arch={arch}"]))
    if resolved.get("arch") is None:
        raise ValueError(
            "harness.training_memory needs an architecture; write arch=NAME, or leave it out for all."
        )
    config = checked_job(resolved)
    device, dtype = choose_device(config.device), getattr(torch, config.dtype)
    torch.manual_seed(config.seed)
    model = build_model(matched_model_config(config)[0]).to(device)
    resolve_implementations(model, device)
    peaks = {n: training_peak_bytes(model, n, device=device, dtype=dtype) for n in lengths_tokens}
    is_recorded = any(override.startswith("output=") for override in overrides)
    _write(config, peaks, environment=describe(device), output=config.output if is_recorded else None)
    return peaks


def _write(
    config: JobConfig, peaks: dict[int, int], *, environment: dict[str, Any], output: str | None
) -> None:
    plain = config.to_plain()
    records = CommandRecords(
        output,
        "harness.training_memory",
        metrics={"training_memory": METRICS},
        environment=environment,
        config=plain,
    )
    for num_tokens, peak_bytes in peaks.items():
        records.write(
            "training_memory",
            {"sequence_tokens": num_tokens},
            timed_identity(plain, plain["arch"], "training_memory", None, environment=environment),
            arch=config.arch.name,
            size=config.size.name,
            seed=config.seed,
            metrics={"peak_memory_bytes": peak_bytes},
        )


def architectures() -> list[str]:
    """Return the project's own architectures that are trained here: without those that read a checkpoint and
    need its path."""
    folder = Path(CONFIG_DIR, "arch")
    entries = {name: OmegaConf.load(folder / f"{name}.yaml") for name in options("arch")}
    return sorted(name for name, entry in entries.items() if not OmegaConf.is_missing(entry, "path"))


def main(overrides: list[str], lengths_tokens: Sequence[int] = LENGTHS_TOKENS) -> int:
    """Print the table; 2 on a user's mistake."""
    named = [o.removeprefix("arch=") for o in overrides if o.startswith("arch=")]
    others = [o for o in overrides if not o.startswith("arch=")]
    first, last = lengths_tokens[0], lengths_tokens[-1]
    print(f"{'':<20}" + "".join(f"{f'{n} tokens':>16}" for n in lengths_tokens) + f"{'ratio':>8}")
    table = {}
    try:
        for arch in named or architectures():
            peaks = table[arch] = measure(arch, others, lengths_tokens)
            cells = "".join(f"{peak / 2**20:>12.1f} MiB" for peak in peaks.values())
            print(f"{arch:<20}{cells}{peaks[last] / peaks[first]:>8.2f}", flush=True)
    except Exception as error:
        text = sentence(error)
        if text is None:
            raise
        print(f"error: {text}", file=sys.stderr)
        return 2
    print(json.dumps(table))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
