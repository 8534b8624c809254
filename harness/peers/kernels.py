"""Our Triton kernels on a GPU against public ones: `python -m harness.peers.kernels [LINE ...]`, in bfloat16.

Every side of a line first agrees with a definition of its own. Ours: outputs and all gradients with the
operation's reference in float64 on the same rounded inputs; where a whole layer is timed, its output too,
with the same layer around the reference, in the line's dtype. Peers: likewise with our reference where they
compute the same; fla with its own naive code in float32; titans-pytorch's output with itself in float64. Then
both run in turn, round by round; a line's speed is the peer's time over ours in the same round, the median,
with quartiles. A peer that is not installed is not measured, and the line says so.

First the card's ceilings are measured: what a copy moves and what a matrix product computes in a second. They
give every line its roofline, the least time for its FLOPs and bytes (harness/peers/roofline.py says what is
counted): in ms, with the fraction of it that our time reaches and which of the two binds. With kernels that
walk the sequence in steps goes their serial floor: our time with one sequence and one head, which no batch
hides, forward, and backward too where the line trains.

Peers: flash-linear-attention (package fla), mamba-ssm, titans-pytorch, flash-attn, torch's own attention.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from harness.measure.statistics import percentile
from harness.measure.time import copy_bytes_per_s, matmul_flops_per_s, time_call_ms
from harness.measure.turns import in_turn, quartiles
from harness.peers.cases import LINES, Line
from harness.peers.operations import KERNELS, Sizes, kernel_error, timed_call
from harness.peers.roofline import Ceilings
from harness.record.command import CommandRecords
from harness.record.environment import describe
from harness.record.identity import machine_identity
from harness.record.metrics import Metric
from harness.record.outcomes import outcome

#: Largest relative error in the 2-norm against float64 on the same rounded inputs.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

#: What parity is checked at, and what the test of this file runs at: these replace a line's own sizes.
PARITY_SIZES = {"batch_size": 1, "num_heads": 2, "channels": 64}
TOY_SIZES = {
    **{"batch_size": 1, "num_heads": 1, "num_tokens": 6, "channels": 8, "head_width": 16, "d_model": 16},
    **{"mini_batch_tokens": 4, "chunk_tokens": 4, "state_width": 4},
}


#: The numbers of a "kernel" point; its cell is the case.
METRICS = (
    Metric(
        name="speed",
        label="times as fast as the peer",
        unit="",
        direction="higher",
        kind="cost",
        low="speed_low",
        high="speed_high",
        is_headline=True,
    ),
    Metric(name="speed_low", label="first quartile", unit="", direction="neither", kind="cost"),
    Metric(name="speed_high", label="third quartile", unit="", direction="neither", kind="cost"),
    Metric(name="minimum_speed", label="required speed", unit="", direction="neither", kind="cost"),
    Metric(name="median_ms", label="ours", unit="ms", direction="lower", kind="cost"),
    Metric(name="peer_median_ms", label="peer", unit="ms", direction="neither", kind="cost"),
    Metric(name="roofline_ms", label="roofline", unit="ms", direction="neither", kind="cost"),
    Metric(
        name="roofline_fraction",
        label="of the roofline",
        unit="share",
        direction="higher",
        kind="cost",
    ),
    Metric(name="serial_floor_ms", label="serial floor", unit="ms", direction="neither", kind="cost"),
    Metric(name="flops", label="FLOPs", unit="FLOPs", direction="neither", kind="cost"),
    Metric(name="bytes", label="bytes", unit="bytes", direction="neither", kind="cost"),
    Metric(name="largest_error", label="error", unit="", direction="lower", kind="cost"),
    Metric(name="layer_error", label="error of the layer", unit="", direction="lower", kind="cost"),
    Metric(name="peer_largest_error", label="error of the peer", unit="", direction="lower", kind="cost"),
)

#: Statuses of a comparison that are no statuses of a record.
RECORDED_STATUSES = {"not measured": "ok", "not alike": "crashed"}


class NotAlike(RuntimeError):
    """A side does not agree with its definition: it is not timed."""


class Missing(RuntimeError):
    """A package is not installed."""


def measure(
    name: str,
    num_rounds: int,
    device: torch.device,
    dtype: torch.dtype,
    ceilings: Ceilings,
    *,
    is_toy: bool = False,
) -> dict[str, Any]:
    """Run one comparison. Return line, peer, sizes, status and reason; largest_error, layer_error (null where
    no layer is timed) and peer_largest_error against the definitions; flops and bytes of our call,
    roofline_ms and roofline_of, "flops" or "bytes"; times in ms and speeds as `in_turn`, null where there is
    no peer; roofline_fraction, roofline_ms over our median time; serial_floor_ms of a serial kernel, null for
    others; minimum_speed and difference. What goes wrong is a status."""
    line = LINES[name]
    kernel = KERNELS[line.kernel]
    sizes = dict(line.sizes) if not is_toy else _replaced(line.sizes, TOY_SIZES)
    result: dict[str, Any] = {
        "line": name,
        "peer": line.peer if line.package is None else f"{line.package}.{line.peer}",
        "sizes": sizes,
        "status": "ok",
        "reason": None,
        **dict.fromkeys(("largest_error", "layer_error", "peer_largest_error", "speed", "speed_quartiles")),
        **dict.fromkeys(("flops", "bytes", "roofline_ms", "roofline_of", "roofline_fraction")),
        **dict.fromkeys(("our_ms", "peer_ms", "serial_floor_ms")),
        "minimum_speed": line.minimum_speed,
        "difference": line.difference,
    }
    parity_tokens = 2 * sizes.get("chunk_tokens", 64) + 33  # over the ends of two chunks
    small = _replaced(sizes, TOY_SIZES if is_toy else {**PARITY_SIZES, "num_tokens": parity_tokens})
    try:
        work = line.work(sizes, dtype)
        roofline_ms, roofline_of = work.roofline(ceilings)
        result |= {"flops": work.flops, "bytes": work.bytes}
        result |= {"roofline_ms": roofline_ms, "roofline_of": roofline_of}
        error = kernel_error(line.kernel, line.implementation, small, device, dtype)
        result["largest_error"] = _held(f"our {line.kernel}", error, TOLERANCES[dtype])
        if line.layer_error is not None:
            error = line.layer_error(small, device, dtype)
            result["layer_error"] = _held(f"our layer around {line.kernel}", error, TOLERANCES[dtype])
        ours, make_peer = line.make(device, dtype, sizes)
        ours()  # warms it up
        result["our_ms"] = [time_call_ms(ours, device) for _ in range(num_rounds)]
        if kernel.is_serial:
            result["serial_floor_ms"] = _serial_floor_ms(line, sizes, device, dtype, num_rounds)
        if line.package is not None and importlib.util.find_spec(line.package) is None:
            raise Missing(f"{line.package} is not installed")
        if line.peer_error is not None:
            tolerance = line.peer_tolerance or TOLERANCES[dtype]
            result["peer_largest_error"] = _held(line.peer, line.peer_error(small, device, dtype), tolerance)
        peer = make_peer()
        peer()
        result |= in_turn(ours, peer, num_rounds, device)
    except Missing as error:
        result |= {"status": "not measured", "reason": str(error)}
    except NotAlike as error:
        result |= {"status": "not alike", "reason": str(error)}
    except Exception as error:  # the other lines are worth having
        status, reason = outcome(error)
        result |= {"status": status, "reason": reason}
    if result["our_ms"] is not None:
        result["roofline_fraction"] = result["roofline_ms"] / percentile(result["our_ms"], 0.5)
    return result


def _replaced(sizes: Sizes, others: Sizes) -> dict[str, int]:
    return {key: others.get(key, value) for key, value in sizes.items()}


def _held(what: str, error: float, tolerance: float) -> float:
    if not error <= tolerance:
        raise NotAlike(f"{what} is {error:.2g} from its definition, more than {tolerance:g}: it is not timed")
    return error


def _serial_floor_ms(
    line: Line, sizes: Sizes, device: torch.device, dtype: torch.dtype, num_rounds: int
) -> float:
    """Time the kernel over one sequence of one head, backward too where the comparison trains; the median."""
    kernel = KERNELS[line.kernel]
    one = {**sizes, "batch_size": 1, "num_heads": 1}
    run, inputs = kernel.bound(one, line.implementation), kernel.inputs(one, device, dtype)
    call = timed_call(run, inputs, is_training=line.is_training)
    call()
    return percentile([time_call_ms(call, device) for _ in range(num_rounds)], 0.5)


def holds(result: Mapping[str, Any]) -> bool:
    """Return whether a comparison is fine: it was fast enough, or only reports, or has no peer here."""
    if result["status"] != "ok":
        return result["status"] == "not measured"
    return result["minimum_speed"] is None or result["speed"] >= result["minimum_speed"]


HEADER = (
    f"{'line':<30}{'ours, ms':>28}{'roofline, ms':>22}{'peer, ms':>28} {'speed':>24}{'asked':>7}"
    f"{'floor, ms':>11}{'error':>9}  peer"
)


def row(result: Mapping[str, Any]) -> str:
    """Return a row of the table: medians, with quartiles in brackets; behind the roofline the fraction of it
    that our median reaches, and what it is of."""

    def spread(values: Sequence[float] | None) -> str:
        if values is None:
            return "not measured"
        low, high = quartiles(values)
        return f"{percentile(values, 0.5):.3g} ({low:.3g} to {high:.3g})"

    speed = result["reason"] or "not measured"
    if result["speed"] is not None:
        low, high = result["speed_quartiles"]
        speed = f"{result['speed']:.2f} ({low:.2f} to {high:.2f})"
        speed += "" if holds(result) else " MISSED"
    asked, floor, error = result["minimum_speed"], result["serial_floor_ms"], result["largest_error"]
    roofline = ""
    if result["roofline_fraction"] is not None:
        fraction, binding = result["roofline_fraction"], result["roofline_of"]
        roofline = f"{result['roofline_ms']:.3g} ({fraction:.0%}, {binding})"
    return (
        f"{result['line']:<30}{spread(result['our_ms']):>28}{roofline:>22}{spread(result['peer_ms']):>28}"
        f" {speed:>24}"
        f"{'' if asked is None else f'{asked:.2f}':>7}{'' if floor is None else f'{floor:.3g}':>11}"
        f"{'' if error is None else f'{error:.1g}':>9}  {result['peer']}"
        f"{'' if result['difference'] is None else '; ' + result['difference']}"
    )


def write_point(records: CommandRecords, result: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
    """Write a comparison, as `measure` returns it, as a point."""
    low, high = result["speed_quartiles"] or (None, None)
    times = {name: result[name] for name in ("our_ms", "peer_ms") if result[name] is not None}
    medians = {name: percentile(values, 0.5) for name, values in times.items()}
    numbers = {"speed_low": low, "speed_high": high}
    numbers |= {"median_ms": medians.get("our_ms"), "peer_median_ms": medians.get("peer_ms")}
    names = {metric.name for metric in METRICS} - numbers.keys()
    records.write(
        "kernel",
        {"case": result["line"]},
        machine_identity("kernel", environment, {"sizes": result["sizes"], "peer": result["peer"]}),
        status=RECORDED_STATUSES.get(result["status"], result["status"]),
        reason=result["reason"],
        metrics={**{name: result[name] for name in names}, **numbers},
        samples=times,
        details={key: result[key] for key in ("peer", "sizes", "roofline_of", "difference")},
    )


def run(
    names: Sequence[str],
    num_rounds: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    output: str | None = None,
    is_toy: bool = False,
) -> int:
    """Print the table, a row as soon as it is measured, and one JSON object as the last line; write points of
    the task "kernel" into OUTPUT/records.

    Returns 0 where nothing is wrong, 1 where a speed is missed or a line failed."""
    width = 64 if is_toy else 8192
    ceilings = Ceilings(
        copy_bytes_per_s=copy_bytes_per_s(device, num_bytes=2**16 if is_toy else 2**31),
        matmul_flops_per_s=matmul_flops_per_s(device, dtype, width=width),
    )
    print(
        f"copy {ceilings.copy_bytes_per_s / 1e9:.0f} GB/s read and written, "
        f"matrix product {ceilings.matmul_flops_per_s / 1e12:.3g} TFLOP/s"
    )
    print(HEADER, flush=True)
    setting = {"dtype": str(dtype).removeprefix("torch."), "num_rounds": num_rounds, **asdict(ceilings)}
    environment = describe(device)
    records = CommandRecords(
        output, "harness.peers.kernels", metrics={"kernel": METRICS}, environment=environment, config=setting
    )
    results = []
    for name in names:
        results.append(measure(name, num_rounds, device, dtype, ceilings, is_toy=is_toy))
        write_point(records, results[-1], environment)
        print(row(results[-1]), flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(json.dumps({**setting, "environment": environment, "results": results}))
    return 0 if all(map(holds, results)) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Do as `run` on the GPU in bfloat16; 2 on a mistake, and where there is no GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.peers.kernels", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("lines", nargs="*", help=f"which of {', '.join(LINES)}; default all")
    parser.add_argument("--rounds", type=int, default=7, help="how often both are timed, default 7")
    parser.add_argument("--output", help="folder whose records/ the comparisons are written to")
    given = parser.parse_args(arguments)
    try:
        if given.rounds < 1:
            raise ValueError(f"--rounds {given.rounds} must be positive.")
        for name in given.lines:
            if name not in LINES:
                raise ValueError(f"there is no line {name!r}; choose of {', '.join(LINES)}.")
        if not torch.cuda.is_available():
            raise ValueError(
                "harness.peers.kernels times kernels on a GPU, and torch sees no CUDA device here."
            )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    names = given.lines or list(LINES)
    return run(names, given.rounds, torch.device("cuda"), torch.bfloat16, output=given.output)


if __name__ == "__main__":
    raise SystemExit(main())
