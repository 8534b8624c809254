"""Whole models through our Triton kernels: the same answers and gradients as through plain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from archs.base import SequenceModel
from archs.implementations import resolve_implementations

pytestmark = pytest.mark.whole_models

KERNELS = {
    "ttt_linear": "ttt_linear",
    "ttt_mlp": "ttt_mlp",
    "titans_lmm": "neural_memory",
    "mamba": "selective_scan",
    "mamba2": "ssd",
}
NUM_TOKENS, NUM_PREFILLED = 7, 5
SMALL = ("size.d_model=16", "size.num_layers=1")  # the interpreter is slow


@pytest.mark.parametrize("arch", KERNELS)
def test_a_model_answers_alike_through_the_kernel(
    arch: str,
    new_model: Callable[..., SequenceModel],
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kernel_device.type == "cpu":  # the interpreter scans a chunk entry by entry
        monkeypatch.setattr("archs.ops.selective_scan.kernel.CHUNK_TOKENS", 8)
    plain = new_model(arch, *SMALL, dtype=torch.float32).to(kernel_device)
    through = f"implementation.{KERNELS[arch]}=triton"
    kernel = new_model(arch, *SMALL, through, dtype=torch.float32).to(kernel_device)
    kernel.load_state_dict(plain.state_dict())
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(plain.vocab_size, (1, NUM_TOKENS + 1), generator=generator).to(kernel_device)
    for model in (plain, kernel):
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    for (name, expected), parameter in zip(plain.named_parameters(), kernel.parameters(), strict=True):
        torch.testing.assert_close(
            parameter.grad, expected.grad, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    with torch.no_grad():
        expected = plain(tokens)
        logits, state = kernel.prefill(tokens[:, :NUM_PREFILLED], kernel.init_state(1, NUM_TOKENS + 1))
        torch.testing.assert_close(logits[:, 0], expected[:, NUM_PREFILLED - 1], rtol=1e-4, atol=1e-4)
        for t in range(NUM_PREFILLED, NUM_TOKENS + 1):
            logits, state = kernel.decode(tokens[:, t], state)
            torch.testing.assert_close(logits, expected[:, t], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["transformer", "sliding_window", "hybrid", "titans_mag"])
def test_a_graphs_steps_are_alike_through_the_kernel(
    arch: str, new_model: Callable[..., SequenceModel], kernel_device: torch.device
) -> None:
    """`decode_at`, past the end of the window too."""
    small = ("size.d_model=16", "size.num_layers=2", "size.num_heads=2", "size.num_kv_heads=1")
    small += ("size.window_tokens=8",)
    model = new_model(arch, *small, "implementation.attention_step=triton", dtype=torch.float32)
    model = model.to(kernel_device)
    names = resolve_implementations(model, kernel_device)
    assert (names["attention"], names["attention_step"]) == ("sdpa", "triton")
    num_tokens = 12
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.vocab_size, (2, num_tokens), generator=generator).to(kernel_device)
    with torch.no_grad():
        expected = model(tokens)
        _, state = model.prefill(tokens[:, :NUM_PREFILLED], model.init_state(2, num_tokens))
        for t in range(NUM_PREFILLED, num_tokens):
            position = torch.full((1,), t, device=kernel_device)
            logits, state = model.decode_at(tokens[:, t], state, position)
            torch.testing.assert_close(logits, expected[:, t], rtol=1e-4, atol=1e-4)
