"""What `harness.peers.kernels` compares: our side and a peer's, line by line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from harness.peers.calls import (
    OUR_LAYER,
    PEER_LAYER,
    MakeCalls,
    MeasureError,
    Peer,
    channels_first,
    fla,
    fla_error,
    implementation_error,
    layer_calls,
    layer_error,
    mamba_ssm,
    operation_calls,
    peer_error,
    sdpa_backend,
    titans_calls,
    titans_error,
    titans_layer_error,
)
from harness.peers.operations import Sizes
from harness.peers.roofline import Work, operation_work, titans_layer_work, ttt_layer_work


@dataclass(frozen=True, kw_only=True)
class Line:
    """One comparison.

    kernel:        of KERNELS, whose parity is checked.
    peer:          its name, for the table. package: what it is in, None for our own or torch's.
    make:          device, dtype, sizes -> our call and what makes the peer's.
    work:          sizes, dtype -> the FLOPs and bytes of our call.
    sizes:         of the timed call. is_training: it is forward and backward.
    layer_error:   of our layer around the kernel, where a whole layer is timed.
    peer_error:    the peer's, against its own definition.
    peer_tolerance: of peer_error, default that of the dtype.
    minimum_speed: what we hold ourselves to, None where the line only reports.
    implementation: ours.
    difference:    what is not alike, None where both compute the same.
    """

    kernel: str
    peer: str
    make: MakeCalls
    work: Callable[[Sizes, torch.dtype], Work]
    sizes: Sizes
    minimum_speed: float | None
    is_training: bool = False
    package: str | None = None
    layer_error: MeasureError | None = None
    peer_error: MeasureError | None = None
    peer_tolerance: float | None = None
    implementation: str = "triton"
    difference: str | None = None


FLA_DIFFERENCE = "fla has one step size a query's token and o + LN(o) in the output; ours computes more"
TITANS_DIFFERENCE = "another update, see python -m harness.peers; alike are the shapes and the chunk's tokens"

BACKENDS = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}


def _lines() -> dict[str, Line]:
    ttt = {"batch_size": 16, "num_tokens": 32768, "num_heads": 32, "head_width": 64, "mini_batch_tokens": 16}
    mlp = {**ttt, "batch_size": 4, "num_tokens": 4096}
    memory = {"batch_size": 4, "num_tokens": 8192, "d_model": 512, "num_heads": 8, "head_width": 64}
    scan = {"batch_size": 4, "num_tokens": 8192, "channels": 4096, "state_width": 16}
    duality = {"batch_size": 4, "num_tokens": 8192, "num_heads": 64, "head_width": 64, "state_width": 128}
    mixing = {"batch_size": 4, "num_tokens": 16384, "num_heads": 16, "head_width": 128}
    lines: dict[str, Line] = {}

    def ours(
        name: str, peer: str | Peer, is_training: bool, implementation: str = "triton"
    ) -> dict[str, Any]:
        return {
            "kernel": name,
            "implementation": implementation,
            "is_training": is_training,
            "make": operation_calls(name, implementation, peer, is_training=is_training),
            "work": functools.partial(operation_work, name, is_training=is_training),
        }

    for mode, is_training in (("forward", False), ("training", True)):
        lines[f"ttt_linear_{mode}"] = Line(
            **ours("ttt_linear", fla, is_training), peer="fused_chunk_ttt_linear", package="fla", sizes=ttt,
            minimum_speed=1.3, peer_error=fla_error, difference=FLA_DIFFERENCE,
        )  # fmt: skip
        lines[f"ttt_mlp_{mode}"] = Line(
            **ours("ttt_mlp", "plain", is_training), peer="our plain", sizes=mlp,
            minimum_speed=10.0 if is_training else None, peer_error=implementation_error("ttt_mlp", "plain"),
        )  # fmt: skip
        lines[f"neural_memory_{mode}"] = Line(
            kernel="neural_memory", peer="NeuralMemory", package="titans_pytorch", minimum_speed=20.0,
            sizes={**memory, "chunk_tokens": 64}, is_training=is_training, difference=TITANS_DIFFERENCE,
            make=titans_calls(is_training=is_training), layer_error=titans_layer_error,
            work=functools.partial(titans_layer_work, is_training=is_training),
            peer_error=titans_error, peer_tolerance=1e-3,
        )  # fmt: skip
        lines[f"selective_scan_{mode}"] = Line(
            **ours("selective_scan", mamba_ssm, is_training), peer="selective_scan_fn", package="mamba_ssm",
            sizes=scan, minimum_speed=0.7, peer_error=peer_error("selective_scan", mamba_ssm, channels_first),
        )  # fmt: skip
        lines[f"ssd_{mode}"] = Line(
            **ours("ssd", "mamba_ssm", is_training), peer="mamba_chunk_scan_combined", package="mamba_ssm",
            sizes={**duality, "chunk_tokens": 256}, minimum_speed=1.0,
            peer_error=implementation_error("ssd", "mamba_ssm"),
        )  # fmt: skip
        for short, backend in BACKENDS.items():
            lines[f"attention_{short}_{mode}"] = Line(
                **ours("attention", sdpa_backend(backend), is_training, "sdpa"), peer=f"torch {backend}",
                sizes=mixing, minimum_speed=0.95, peer_error=peer_error("attention", sdpa_backend(backend)),
            )  # fmt: skip
        lines[f"attention_flash_attn_{mode}"] = Line(
            **ours("attention", "flash_attn", is_training, "sdpa"), peer="flash_attn_func",
            package="flash_attn", sizes=mixing, minimum_speed=0.95,
            peer_error=implementation_error("attention", "flash_attn"),
        )  # fmt: skip
    for batch in (16, 1):
        for tokens in (2048, 8192, 32768):
            lines[f"layer_prefill_b{batch}_{tokens}"] = Line(
                kernel="ttt_linear", peer="attention's layer", make=layer_calls, work=ttt_layer_work,
                sizes={**ttt, "batch_size": batch, "num_tokens": tokens, "d_model": 2048},
                minimum_speed=1.0 if batch == 16 and tokens >= 8192 else None,
                layer_error=layer_error(*OUR_LAYER), peer_error=layer_error(*PEER_LAYER),
                difference="a layer of width 2048 with its projections: TTT-Linear's against attention's",
            )  # fmt: skip
    return lines


LINES = _lines()
