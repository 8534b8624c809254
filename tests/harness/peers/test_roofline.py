"""FLOPs and bytes of the kernel benchmark's calls, against torch's counter and the tensors of real calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from archs.base import state_tensors
from archs.ttt import TTTLinear
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


def test_flops_of_what_a_counter_cannot_see() -> None:
    """A causal attention does half of the products, and a scan has none."""
    tokens, width = 96, 3 * 32
    assert operation_flops("attention", SIZES["attention"]) == 2 * 4 * width * tokens * (tokens + 1) / 2
    assert operation_flops("selective_scan", SIZES["selective_scan"]) == 2 * tokens * 9 * 40 * 8


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
@pytest.mark.parametrize("name", list(SIZES))
def test_bytes_are_those_of_a_calls_inputs_and_outputs(name: str, dtype: torch.dtype) -> None:
    kernel, sizes = KERNELS[name], SIZES[name]
    inputs = kernel.inputs(sizes, CPU, dtype)
    with torch.no_grad():
        outputs = kernel.run(inputs, sizes, "reference")
    read, written = (sum(t.nbytes for t in tensors) for tensors in (inputs, outputs))
    gradients = read + outputs[0].nbytes  # written for every input, read for y
    assert operation_work(name, sizes, dtype, is_training=False).bytes == read + written
    assert operation_work(name, sizes, dtype, is_training=True).bytes == read + written + read + gradients


def test_bytes_of_attention_by_hand() -> None:
    sequence = 2 * 96 * 3 * 32 * 2  # q, k, v and y in bfloat16, and their gradients
    works = [
        operation_work("attention", SIZES["attention"], torch.bfloat16, is_training=t) for t in (False, True)
    ]
    assert [work.bytes for work in works] == [4 * sequence, (4 + 3 + 1 + 3) * sequence]


def test_a_layer_has_its_projections_parameters_and_state_too() -> None:
    sizes = {**SIZES["ttt_linear"], "d_model": 96}
    layer = TTTLinear(d_model=96, num_heads=3, mini_batch_tokens=16).to(torch.bfloat16)
    x = torch.randn(2, 96, 96, dtype=torch.bfloat16)
    with torch.no_grad():
        y, state = layer.prefill(x, layer.init_state(2, 96))
    work = ttt_layer_work(sizes, torch.bfloat16)
    assert work.bytes == sum(t.nbytes for t in (x, y, *layer.parameters(), *state_tensors(state)))
    around = 2 * 96 * (8 * 96**2 + 2 * 96 * 3 + 2 * 2 * 4 * 96)  # projections, step size, convolutions
    assert work.flops == pytest.approx(operation_flops("ttt_linear", sizes) + around, rel=1e-12)


def test_a_titans_layer_keeps_its_parameters_and_state_in_float32() -> None:
    layer = titans_layers(96, 3, 16)[0]()
    parameters = sum(p.nbytes for p in layer.parameters())
    x, state = 2 * 96 * 96 * 4, 3 * 2 * 3 * (32 * 128 + 128 * 32) * 4
    sizes = {**HEADS, "d_model": 96, "chunk_tokens": 16}
    forward, training = (titans_layer_work(sizes, torch.bfloat16, is_training=t) for t in (False, True))
    assert forward.bytes == x + parameters + x // 2 + state
    assert training.bytes == forward.bytes + 2 * (x + parameters) + x // 2
    assert training.flops == 3 * forward.flops == 3 * 2 * layer.flops(96, "prefill")


def test_the_roofline_is_the_later_of_the_two() -> None:
    ceilings = Ceilings(copy_bytes_per_s=2e12, matmul_flops_per_s=5e14)
    assert Work(flops=5e11, bytes=10**9).roofline(ceilings) == (1.0, "flops")
    assert Work(flops=5e11, bytes=4 * 10**9).roofline(ceilings) == (2.0, "bytes")
