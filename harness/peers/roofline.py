"""What a line of `harness.peers.kernels` has to compute and to move, and the least time that the card's
measured ceilings allow for it, its roofline.

FLOPs, a multiply-add is two: the formulas of the layers (`flops` of archs/ttt.py, mamba.py, attention.py and
titans.py; rules and sources in archs/README.md, "What counts as a FLOP"), elementwise scans included. An
operation's own are its layer's without the linear layers and convolutions around it. A training step is three
times the forward pass: the backward pass of a product a b is two products of the same size, one for each
factor's gradient, as `tasks.training_speed` counts too. What a kernel computes again is its own affair.

Bytes: what no kernel can avoid. Forward, every input once and every output once, the final state with them; a
state of zeros is not read. Backward, the inputs again, the gradient of the sequence's output, and a gradient
for every input. What a kernel keeps for itself in between is not counted.

It is a bound and not a promise: the ceiling of products is that of a large matrix product in the line's
dtype, which exponentials, elementwise work and products of float32 numbers cannot reach, and steps that wait
for each other are not in it: of kernels that walk a sequence the serial floor stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.config.build import build_model
from harness.peers.operations import KERNELS, Sizes
from harness.peers.titans import titans_layers

#: Forward and backward over forward.
TRAINING_FACTOR = 3


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """The card's measured bounds per second: bytes read and written by a copy, FLOPs of a matrix
    product."""

    copy_bytes_per_s: float
    matmul_flops_per_s: float


@dataclass(frozen=True, kw_only=True)
class Work:
    """The FLOPs and bytes of one call."""

    flops: float
    bytes: int

    def roofline(self, ceilings: Ceilings) -> tuple[float, str]:
        """Return the least time in ms, and which of "flops" and "bytes" binds."""
        flops_ms = 1e3 * self.flops / ceilings.matmul_flops_per_s
        bytes_ms = 1e3 * self.bytes / ceilings.copy_bytes_per_s
        return (flops_ms, "flops") if flops_ms >= bytes_ms else (bytes_ms, "bytes")


def work_of(
    forward_flops: float, inputs: Iterable[Tensor], outputs: Sequence[Tensor], *, is_training: bool
) -> Work:
    """Return the work of a call on `inputs`, parameters among them, with `outputs`, the first of which gets a
    gradient when training, as every input does. Only the tensors' bytes are looked at."""
    read, written = (sum(t.nbytes for t in tensors) for tensors in (inputs, outputs))
    if not is_training:
        return Work(flops=forward_flops, bytes=read + written)
    backward = 2 * read + outputs[0].nbytes
    return Work(flops=TRAINING_FACTOR * forward_flops, bytes=read + written + backward)


def operation_work(name: str, sizes: Sizes, dtype: torch.dtype, *, is_training: bool) -> Work:
    """Return the work of one of KERNELS with inputs of `sizes`, those of the tokens in dtype. Bytes are
    linear in the tokens, so the tensors of one token and of two, as the definition has them, tell those of
    any number."""
    kernel, flops = KERNELS[name], operation_flops(name, sizes)

    def num_bytes(num_tokens: int) -> int:
        few = {**sizes, "num_tokens": num_tokens}
        inputs = kernel.inputs(few, torch.device("cpu"), dtype)
        with torch.no_grad():
            outputs = kernel.run(inputs, few, "reference")
        return work_of(flops, inputs, outputs, is_training=is_training).bytes

    one, two = num_bytes(1), num_bytes(2)
    whole = one + (sizes["num_tokens"] - 1) * (two - one)
    return Work(flops=flops * (TRAINING_FACTOR if is_training else 1), bytes=whole)


def operation_flops(name: str, sizes: Sizes) -> float:
    """Count the forward pass, all sequences: the layer's FLOPs without those around the operation."""
    layer: Any = build_model(_layer(name, sizes), "meta")
    tokens = sizes["num_tokens"]
    around = [m.weight for m in layer.modules() if isinstance(m, (nn.Linear, nn.Conv1d))]
    if name.startswith("ttt"):
        around.append(layer.learnable_ttt_lr_weight)  # a token's step size is a product too
    whole = layer.flops(tokens, "prefill").total
    return sizes["batch_size"] * (whole - 2.0 * tokens * sum(w.numel() for w in around))


def _layer(name: str, sizes: Sizes) -> Mapping[str, Any]:
    """Return a layer whose operation has these sizes."""
    if name == "selective_scan":
        width, state = sizes["channels"], sizes["state_width"]
        return {"_target_": "archs.mamba.Mamba", "d_model": width, "inner_width": width, "state_width": state}
    heads, width = sizes["num_heads"], sizes["num_heads"] * sizes["head_width"]
    if name == "ssd":
        more = {key: sizes[key] for key in ("state_width", "head_width", "chunk_tokens")}
        return {"_target_": "archs.mamba.Mamba2", "d_model": width, "inner_width": width, **more}
    if name == "attention":
        return {"_target_": "archs.attention.Attention", "d_model": width, "num_heads": heads}
    target = {"ttt_linear": "archs.ttt.TTTLinear", "ttt_mlp": "archs.ttt.TTTMLP"}[name]
    batched = {"mini_batch_tokens": sizes["mini_batch_tokens"]}
    return {"_target_": target, "d_model": width, "num_heads": heads, **batched}


def ttt_layer_work(sizes: Sizes, dtype: torch.dtype) -> Work:
    """Return the work of a prefill of a whole TTT-Linear layer, parameters and sequence in dtype, the state
    in its own."""
    layer: Any = build_model(_layer("ttt_linear", sizes), "meta").to(dtype)
    batch, tokens, width = (sizes[key] for key in ("batch_size", "num_tokens", "d_model"))
    x = torch.empty(batch, tokens, width, dtype=dtype, device="meta")
    state = torch.empty(layer.state_bytes_at(batch, tokens), dtype=torch.uint8, device="meta")
    flops = batch * layer.flops(tokens, "prefill").total
    return work_of(flops, [x, *layer.parameters()], [x, state], is_training=False)


def titans_layer_work(sizes: Sizes, dtype: torch.dtype, *, is_training: bool) -> Work:
    """Return the work of our memory with its projections under autocast to dtype: parameters, x and the state
    in float32; y is counted in dtype, the narrower of the two."""
    batch, tokens, width = (sizes[key] for key in ("batch_size", "num_tokens", "d_model"))
    layer = titans_layers(width, sizes["num_heads"], sizes["chunk_tokens"])[0]()
    x = torch.empty(batch, tokens, width, device="meta")
    state = torch.empty(3 * layer.weight_bytes(batch), dtype=torch.uint8, device="meta")
    flops = batch * layer.flops(tokens, "prefill")
    return work_of(flops, [x, *layer.parameters()], [x.to(dtype), state], is_training=is_training)
