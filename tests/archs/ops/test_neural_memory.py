"""The neural memory: goldens, chunkings, gradients, gates at their ends."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from archs.ops.neural_memory import NeuralMemoryState, neural_memory, read
from archs.ops.operation import ImplementationUnavailable

GOLDENS = Path(__file__).parents[2] / "goldens" / "titans_memory"
CASES = ("linear_chunk1", "linear_chunk16", "mlp_chunk1", "mlp_chunk16")
IMPLEMENTATIONS = ("reference", "plain")


def start_state(matrices: list[Tensor], batch_size: int) -> NeuralMemoryState:
    """The state before the first token, from matrices (H, in, out)."""
    weights = tuple(m.expand(batch_size, *m.shape).clone() for m in matrices)
    return NeuralMemoryState(
        tuple(w.clone() for w in weights), weights, tuple(torch.zeros_like(w) for w in weights)
    )


def random_case(
    depth: int = 2, num_tokens: int = 21, is_grad: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v, decay, step size, momentum of 2 rows and 3 heads of width 4; and the matrices."""
    generator = torch.Generator().manual_seed(depth)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = [normal(2, num_tokens, 3, 4) for _ in range(3)]
    gates = [normal(2, num_tokens, 3).sigmoid() * scale for scale in (0.5, 0.1, 1.0)]
    widths = [4] + [6] * (depth - 1) + [4]
    matrices = [normal(3, *pair) / 2 for pair in itertools.pairwise(widths)]
    tensors = inputs + gates + matrices
    if is_grad:
        tensors = [t.requires_grad_() for t in tensors]
    return tensors[:6], tensors[6:]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_goldens(case: str, implementation: str) -> None:
    with safe_open(GOLDENS / case / "case.safetensors", "pt") as file:
        names = file.keys()  # the file itself cannot be iterated over
        tensors = {name: file.get_tensor(name) for name in names}
        chunk_tokens = int(file.metadata()["chunk_tokens"])
    inputs = [tensors[name].transpose(1, 2) for name in ("q", "k", "v", "decay", "step_size", "momentum")]
    matrices = [tensors[name] for name in ("w0", "w1") if name in tensors]
    state = start_state(matrices, inputs[0].shape[0])
    y, state = neural_memory(*inputs, state, 0, chunk_tokens=chunk_tokens, implementation=implementation)
    torch.testing.assert_close(y, tensors["y"].transpose(1, 2), atol=1e-10, rtol=0)
    for layer in range(len(matrices)):
        if f"final_w_last_head{layer}" in tensors:
            for value, name in ((state.weights, "final_w"), (state.momentum, "final_momentum")):
                expected = tensors[f"{name}_last_head{layer}"]
                torch.testing.assert_close(value[layer][0, -1], expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("gate", [3, 4, 5], ids=["decay", "step_size", "momentum"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_gates_of_exactly_zero_and_one(gate: int, value: float) -> None:
    results = []
    for implementation in IMPLEMENTATIONS:
        inputs, matrices = random_case(num_tokens=12)
        inputs[gate][:, ::2] = value
        inputs = [t.requires_grad_() for t in inputs]
        y, _ = neural_memory(
            *inputs, start_state(matrices, 2), 0, chunk_tokens=4, implementation=implementation
        )
        results.append((y, *torch.autograd.grad(y.sum(), inputs)))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)


def test_a_long_sequence_is_recomputed_with_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    import archs.ops.neural_memory.plain as plain

    gradients = []
    for chunks in (2, 100):
        monkeypatch.setattr(plain, "CHECKPOINT_CHUNKS", chunks)
        inputs, matrices = random_case(is_grad=True)
        y, _ = neural_memory(*inputs, start_state(matrices, 2), 0, chunk_tokens=4)
        gradients.append(torch.autograd.grad(y.square().sum(), inputs + matrices))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-12, rtol=1e-12)


def test_a_state_owns_its_storage_at_a_chunk_end() -> None:
    inputs, matrices = random_case(num_tokens=8)
    _, state = neural_memory(*inputs, start_state(matrices, 2), 0, chunk_tokens=8)
    pointers = [t.untyped_storage().data_ptr() for part in state for t in part]
    assert len(set(pointers)) == 6
    torch.testing.assert_close(state.start, state.weights)


def test_reading_with_fixed_weights_is_a_step_that_changes_nothing() -> None:
    inputs, matrices = random_case(num_tokens=5)
    for gate in inputs[3:]:
        gate.zero_()
    state = start_state(matrices, 2)
    expected = read(inputs[0], state.weights)
    y, _ = neural_memory(*inputs, state, 0, chunk_tokens=4, implementation="reference")
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)


def test_mistakes_are_named() -> None:
    inputs, matrices = random_case(num_tokens=2)
    state = start_state(matrices, 2)
    with pytest.raises(ValueError, match="chunk_tokens=0"):
        neural_memory(*inputs, state, 0, chunk_tokens=0)
    with pytest.raises(ValueError, match="position=4"):
        neural_memory(*inputs, state, 4, chunk_tokens=4)
    with pytest.raises(ImplementationUnavailable, match="reference, plain"):
        neural_memory(*inputs, state, 0, chunk_tokens=4, implementation="fast")
