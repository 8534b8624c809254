"""Writes synthetic records of a whole experiment, with the fields that the harness writes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from harness.record.metrics_of_version_1 import METRICS
from harness.record.schema import Header, Point, append

CONTEXTS = (256, 512, 1024, 2048, 4096)
TRAINED = (256, 512)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
#: name -> (display name, colour, bits per byte at 256 tokens, decode growth with context).
ARCHITECTURES: dict[str, tuple[str, str, float, float]] = {
    "transformer": ("Transformer", "#4c4c4c", 2.10, 1.0),
    "transformer_conv": ("Transformer + convolution", "#9a9a9a", 2.02, 1.0),
    "mamba": ("Mamba", "#1f77b4", 2.05, 0.0),
    "mamba2": ("Mamba-2", "#17a2c4", 2.03, 0.0),
    "ttt_linear": ("TTT-Linear", "#2ca02c", 2.07, 0.0),
    "ttt_mlp": ("TTT-MLP", "#8bbd3f", 2.06, 0.0),
    "titans_lmm": ("Titans LMM", "#d62728", 2.04, 0.0),
    "titans_mac": ("Titans MAC", "#e8743b", 2.01, 0.2),
    "titans_mag": ("Titans MAG", "#f2a541", 2.00, 0.2),
    "titans_mal": ("Titans MAL", "#b5651d", 2.02, 0.2),
    "transformer_squared": ("Transformer²", "#9467bd", 2.11, 1.0),
    "recurrent": ("LSTM", "#e377c2", 2.25, 0.0),
    "hybrid": ("Hybrid", "#6b4c9a", 1.99, 0.4),
}
ENVIRONMENT: dict[str, Any] = {
    "cpu_name": "Example CPU 9000",
    "num_cpus": 2,
    "gpu_name": None,
    "python": "3.12.4",
    "torch": "2.13.0",
    "platform": "Linux",
    "git_commit": "0123abc",
    "is_dirty": False,
}
#: task -> the family of its identity; "model" where it is measured on a trained model.
FAMILIES = {
    task: task for task in ("cost", "learning_rate_search", "calibration", "latency", "training_speed")
}
COMMAND = "python -m harness experiment=example"
Change = Callable[[Point], Point | None]


def header(arch: str | None, *, run_id: str, seed: int = 0, **changes: Any) -> Header:
    """A run's header; the latency job's has no `arch`."""
    config: dict[str, Any] = {"seed": seed, "task": {"contexts": list(CONTEXTS)}}
    if arch is not None:
        name, colour, *_ = ARCHITECTURES[arch]
        config["arch"] = {"name": arch, "display_name": name, "colour": colour}
    fields: dict[str, Any] = {
        "run_id": run_id,
        "job": f"{arch or 'latency'}-tiny-seed{seed}",
        "experiment": "example",
        "config": config,
        "config_hash": f"hash-{arch or 'latency'}",
        "command": COMMAND,
        "environment": dict(ENVIRONMENT),
        "data_hash": "data123",
        "started_at": "2026-01-01T10:00:00+00:00",
        "metrics": METRICS,
    }
    return Header(**(fields | changes))


def point(arch: str, task: str, cell: dict[str, Any], *, run_id: str, seed: int = 0, **fields: Any) -> Point:
    """A point of size tiny."""
    return Point(run_id=run_id, arch=arch, size="tiny", seed=seed, task=task, cell=cell, **fields)


def quality_points(arch: str, *, run_id: str, seed: int = 0) -> list[Point]:
    """Everything a model job records: search, training, cost, perplexity and needle."""
    _, _, base, growth = ARCHITECTURES[arch]
    base += 0.01 * seed
    points = [
        point(
            arch,
            "learning_rate_search",
            {"learning_rate": rate},
            run_id=run_id,
            seed=seed,
            metrics={"mixture_loss_nats": base + abs(math.log10(rate / 1e-3))},
        )
        for rate in (3e-4, 1e-3, 3e-3)
    ]
    steps = list(range(1, 101))
    points.append(
        point(
            arch,
            "train",
            {},
            run_id=run_id,
            seed=seed,
            metrics={
                "num_parameters": 1_000_000 + 100 * len(arch),
                "trained_tokens": 819_200,
                "train_seconds": 40.0,
                "tokens_per_s": 20_480.0 / (1 + growth),
                "final_validation_loss_nats": base * math.log(2),
                "final_validation_bits_per_byte": base,
                "learning_rate": 1e-3,
            },
            samples={
                "step": steps,
                "loss_nats": [base + 3 / step + 0.05 * math.sin(step) for step in steps],
                "validation_step": steps[9::10],
                "validation_loss_nats": [base + 3 / step for step in steps[9::10]],
            },
            details={
                "implementations": {"mixer": "plain"},
                "device": "cpu",
                "dtype": "float32",
                "parameter_mismatch": 0.004,
                "trained_lengths_tokens": list(TRAINED),
            },
        )
    )
    card = {str(2**power): 2**power for power in range(10, 21, 2)}
    points.append(
        point(
            arch,
            "cost",
            {},
            run_id=run_id,
            seed=seed,
            metrics={"num_parameters": 1_000_000 + 100 * len(arch)},
            details={
                "state_bytes": {key: state_bytes(arch, tokens) for key, tokens in card.items()},
                "prefill_flops_per_token": {key: 2e6 + growth * 64 * n for key, n in card.items()},
                "decode_flops_per_token": {
                    key: 3e6 - 1e6 * growth + growth * 128 * n for key, n in card.items()
                },
                "dtype": "float32",
            },
        )
    )
    points += [perplexity_point(arch, context, run_id=run_id, seed=seed) for context in CONTEXTS]
    points += [
        needle_point(arch, context, depth, run_id=run_id, seed=seed)
        for context in CONTEXTS
        for depth in DEPTHS
    ]
    return points


def state_bytes(arch: str, context_tokens: int) -> int:
    """A cache that grows for the attention models, and a constant for the others."""
    growth = ARCHITECTURES[arch][3]
    return int(65_536 * (1 - 0.9 * growth) + growth * 256 * context_tokens)


def bits_per_byte(arch: str, context_tokens: int, seed: int = 0) -> float:
    """Falls with context; rises again beyond the trained lengths for attention without memory."""
    _, _, base, growth = ARCHITECTURES[arch]
    doublings = math.log2(context_tokens / 256)
    return base - 0.04 * doublings + 0.05 * growth * max(0.0, doublings - 1) ** 1.5 + 0.01 * seed


def perplexity_point(arch: str, context_tokens: int, *, run_id: str, seed: int = 0) -> Point:
    """Forty documents whose sizes and difficulties differ."""
    bits = bits_per_byte(arch, context_tokens, seed)
    num_bytes = [4096 + 128 * index for index in range(40)]
    nats = [
        bits * math.log(2) * n * (1 + 0.1 * math.sin(i)) + len(arch) * math.cos(3 * i)
        for i, n in enumerate(num_bytes)
    ]
    edges = [0, 64, 128, *[context for context in CONTEXTS if context <= context_tokens]]
    return point(
        arch,
        "perplexity",
        {"context_tokens": context_tokens},
        run_id=run_id,
        seed=seed,
        metrics={
            "bits_per_byte": bits,
            "bits_per_byte_low": bits - 0.05,
            "bits_per_byte_high": bits + 0.05,
            "perplexity": 2**bits,
            "num_documents": 40,
            "num_tokens": sum(num_bytes),
        },
        samples={
            "document_nll_nats": nats,
            "document_bytes": num_bytes,
            "document_tokens": num_bytes,
            "bucket_start_tokens": edges[:-1],
            "bucket_end_tokens": edges[1:],
            "bucket_loss_nats": [bits * math.log(2) + 0.5 / (1 + index) for index in range(len(edges) - 1)],
        },
        details={
            "domains": {"standard library": bits - 0.1, "torch": bits + 0.1},
            "adaptation": "the expert of the document's domain" if arch == "transformer_squared" else None,
        },
    )


def needle_point(arch: str, context_tokens: int, depth: float, *, run_id: str, seed: int = 0) -> Point:
    """Twenty examples; recall decays beyond the trained lengths, faster the more attention there is."""
    growth = ARCHITECTURES[arch][3]
    beyond = max(0.0, math.log2(context_tokens / TRAINED[-1]))
    skill = 0.1 if arch in ("transformer", "recurrent") else 0.97
    num_correct = round(20 * skill * math.exp(-beyond * (0.15 + growth) * (1.2 - depth)))
    is_correct = [1] * num_correct + [0] * (20 - num_correct)
    return point(
        arch,
        "needle",
        {"context_tokens": context_tokens, "depth": depth},
        run_id=run_id,
        seed=seed,
        metrics={
            "accuracy": num_correct / 20,
            "accuracy_low": max(0.0, num_correct / 20 - 0.1),
            "accuracy_high": min(1.0, num_correct / 20 + 0.1),
            "num_examples": 20,
            "answer_log_probability_nats": -9.2 + 9 * num_correct / 20,
            "chance_accuracy": 0.0001,
            "achieved_depth_tokens": depth * context_tokens,
            "is_trained_length": int(context_tokens in TRAINED),
        },
        samples={
            "is_correct": is_correct,
            "answer_log_probability_nats": [-0.5] * 20,
            "depth_tokens": [1] * 20,
        },
    )


def latency_points(arch: str, *, run_id: str, seed: int = 0) -> list[Point]:
    """Prefill and decode at batch 1 and 4. Attention starts cheaper and grows with the context."""
    display_name, colour, _, growth = ARCHITECTURES[arch]
    points = []
    for context in CONTEXTS:
        for batch_size in (1, 4):
            for phase in ("prefill", "decode"):
                per_token = (0.6 + 0.02 * len(arch)) * (1 - 0.6 * growth) + growth * context / 2500
                median = per_token * batch_size**0.5 * (context * 0.02 if phase == "prefill" else 1.0)
                points.append(
                    point(
                        arch,
                        "latency",
                        {"phase": phase, "context_tokens": context, "batch_size": batch_size},
                        run_id=run_id,
                        seed=seed,
                        metrics={
                            "median_ms": median,
                            "p10_ms": 0.95 * median,
                            "p90_ms": 1.08 * median,
                            "tokens_per_s": 1e3
                            * batch_size
                            * (context if phase == "prefill" else 1)
                            / median,
                            "peak_memory_bytes": 30_000_000 + 4000 * context * batch_size,
                            "state_bytes": batch_size * state_bytes(arch, context),
                            "first_call_ms": 3 * median,
                            "dispatch_ms": 0.4 * median if arch == "transformer_squared" else None,
                        },
                        samples={"time_ms": [median] * 5},
                        details={
                            "implementations": {"mixer": "plain"},
                            "display_name": display_name,
                            "colour": colour,
                            "dtype": "float32",
                            "num_parameters": 1_000_000,
                        },
                    )
                )
    return points


def write_experiment(
    folder: Path,
    *,
    archs: tuple[str, ...] = tuple(ARCHITECTURES),
    seeds: tuple[int, ...] = (0,),
    change: Change = lambda point: point,
    tag: str = "",
    subject: str = "same",
    **header_changes: Any,
) -> Path:
    """Writes an experiment's records; `change` may alter a point, or drop it by returning None.

    `tag` sets the runs apart from those of another call on the same folder, `subject` the models."""
    for arch in archs:
        for seed in seeds:
            run_id = f"run-{arch}-{seed}{tag}"
            path = folder / "records" / f"{arch}-tiny-seed{seed}.jsonl"
            append(path, header(arch, run_id=run_id, seed=seed, **header_changes))
            _append_all(path, quality_points(arch, run_id=run_id, seed=seed), change, subject)
    path, run_id = folder / "records" / "latency.jsonl", f"run-latency{tag}"
    append(path, header(None, run_id=run_id, **header_changes))
    calibration = point("", "calibration", {}, run_id=run_id, metrics={"matmul_ms": 2.0})
    _append_all(path, [calibration], change, subject)
    for arch in archs:
        _append_all(path, latency_points(arch, run_id=run_id), change, subject)
    return folder


def _append_all(path: Path, points: list[Point], change: Change, subject: str) -> None:
    """One write for all of them: `append` waits for the disk after each, for a sweep's sake."""
    changed = [
        replace(after, identity=f"{FAMILIES.get(after.task, 'model')}:{subject}:data123:-")
        for before in points
        if (after := change(before)) is not None
    ]
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(point)) + "\n" for point in changed)


def failed(original: Point, status: str, reason: str) -> Point:
    """The same cell without a number."""
    return replace(original, status=status, reason=reason, metrics={}, samples={})
