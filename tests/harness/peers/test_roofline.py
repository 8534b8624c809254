"""FLOPs and bytes of the kernel benchmark's calls, against torch's counter and sums done by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.peers.calls import titans_layers
from harness.peers.operations import KERNELS
from harness.peers.roofline import (
    Ceilings,
    Work,
    operation_flops,
    operation_work,
    titans_layer_work,
    ttt_layer_work,
)

CPU = torch.device("cpu")
HEADS = {"batch_size": 2, "num_tokens": 96, "num_heads": 3, "head_width": 32}
SIZES = {
    "ttt_linear": {**HEADS, "mini_batch_tokens": 16},
    "ttt_mlp": {**HEADS, "mini_batch_tokens": 16},
    "ssd": {**HEADS, "state_width": 24, "chunk_tokens": 32},
    "attention": HEADS,
    "selective_scan": {"batch_size": 2, "num_tokens": 96, "channels": 40, "state_width": 8},
}


def counted(call: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_products_are_those_that_a_counter_sees() -> None:
    """Of our plain implementations, which compute what the kernels compute, within the contract's 2%."""
    for name in ("ttt_linear", "ttt_mlp", "ssd"):
        sizes, kernel = SIZES[name], KERNELS[name]
        inputs = kernel.inputs(sizes, CPU, torch.float32)
        flops = operation_flops(name, sizes)
        if name == "ssd":  # decays between a chunk's tokens and the carrying, which no counter sees
            tokens = 2 * 96
            flops -= tokens * (3 * 32 * 3 + 2 * 24 * 96 / 32)
        with torch.no_grad():
            seen = counted(lambda: kernel.run(inputs, sizes, "plain"))  # noqa: B023
        assert seen == pytest.approx(flops, rel=0.02), name


def test_flops_are_the_sums_that_the_contract_writes_down() -> None:
    tokens, heads, f, b, N = 2 * 96, 3, 32, 16, 24
    width, Q = heads * f, 32
    by_hand = {
        "ttt_linear": tokens * heads * (6 * f**2 + 4 * b * f + 6 * f + 2 * b),
        "ttt_mlp": tokens * heads * (56 * f**2 + 20 * b * f + 30 * f + 4 * b),
        "ssd": tokens * (2 * Q * (N + width) + 4 * N * width + 3 * Q * heads + 2 * N * width / Q),
        "attention": 2 * 4 * width * 96 * 97 / 2,
        "selective_scan": tokens * 9 * 40 * 8,
    }
    for name, flops in by_hand.items():
        assert operation_flops(name, SIZES[name]) == pytest.approx(flops, rel=1e-12), name


def test_a_training_step_is_three_forward_passes() -> None:
    q, k, v = (torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3))

    def forward() -> torch.Tensor:
        return (q @ k.mT).softmax(-1) @ v

    def training() -> None:
        forward().sum().backward()

    assert counted(training) == 3 * counted(forward)
    for name, sizes in SIZES.items():
        works = [operation_work(name, sizes, torch.float32, is_training=t) for t in (False, True)]
        assert works[1].flops == 3 * works[0].flops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_inputs_and_outputs_once(dtype: torch.dtype) -> None:
    size = dtype.itemsize
    sequence = 2 * 96 * 3 * 32 * size  # q, k, v, x, y and their gradients

    def bytes_of(name: str) -> list[int]:
        works = [operation_work(name, SIZES[name], dtype, is_training=t) for t in (False, True)]
        return [work.bytes for work in works]

    assert bytes_of("attention") == [4 * sequence, (4 + 3 + 1 + 3) * sequence]

    step_sizes, once, weights = 2 * 96 * 3 * size, (16 + 2 * 3 * 32) * 4, 2 * 3 * 33 * 32 * 4
    inputs = 3 * sequence + step_sizes + once + weights
    outputs = sequence + 2 * weights  # y, the weights after, and the open gradient
    assert bytes_of("ttt_linear") == [inputs + outputs, 3 * inputs + outputs + sequence]

    maps, steps, state = 2 * (2 * 96 * 24) * size, 2 * 96 * 3 * 4, 2 * 3 * 32 * 24 * 4
    inputs = sequence + maps + steps + 2 * 3 * 4  # A and D, one a head
    assert bytes_of("ssd") == [inputs + sequence + state, 3 * inputs + 2 * sequence + state]

    x, maps, steps, state = 2 * 96 * 40 * size, 2 * (2 * 96 * 8) * size, 2 * 96 * 40 * 4, 2 * 40 * 8 * 4
    inputs = x + maps + steps + (40 * 8 + 40) * 4  # A and D
    assert bytes_of("selective_scan") == [inputs + x + state, 3 * inputs + 2 * x + state]


def test_a_layer_has_its_parameters_too() -> None:
    sizes = {**SIZES["ttt_linear"], "d_model": 96}
    work = ttt_layer_work(sizes, torch.bfloat16)
    inner = operation_flops("ttt_linear", sizes)
    around = 2 * 96 * (8 * 96**2 + 2 * 96 * 3 + 2 * 2 * 4 * 96)  # projections, step size, convolutions
    assert work.flops == pytest.approx(inner + around, rel=1e-12)
    parameters = 4 * 96**2 + 96 * 3 + 3 + 2 * 4 * 96 + 2 * 96 + 16 + 2 * 96 + 2 * 96 + 3 * 33 * 32
    x, state = 2 * 96 * 96 * 2, 2 * 2 * 3 * 33 * 32 * 4 + 2 * 2 * 96 * 4 * 2
    assert work.bytes == 2 * x + 2 * parameters + state

    sizes = {**HEADS, "d_model": 96, "chunk_tokens": 16}
    layer = titans_layers(96, 3, 16)[0]()
    parameters = 4 * sum(p.numel() for p in layer.parameters())
    forward, training = (titans_layer_work(sizes, torch.bfloat16, is_training=t) for t in (False, True))
    x, state = 2 * 96 * 96 * 4, 3 * 2 * 3 * (32 * 128 + 128 * 32) * 4
    assert forward.bytes == x + parameters + x // 2 + state
    assert training.bytes == forward.bytes + 2 * (x + parameters) + x // 2
    assert training.flops == 3 * forward.flops == 3 * 2 * layer.flops(96, "prefill")


def test_the_roofline_is_the_later_of_the_two() -> None:
    ceilings = Ceilings(copy_bytes_per_s=2e12, matmul_flops_per_s=5e14)
    assert Work(flops=5e11, bytes=10**9).roofline(ceilings) == (1.0, "flops")
    assert Work(flops=5e11, bytes=4 * 10**9).roofline(ceilings) == (2.0, "bytes")
