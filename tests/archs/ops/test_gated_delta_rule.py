"""The gated delta rule: the definition's own properties, and the chunked plain path against it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from archs.ops.gated_delta_rule import gated_delta_rule
from archs.ops.gated_delta_rule import plain as plain_module
from archs.ops.ssd import ssd

BATCH, HEADS, KEY, VALUE = 2, 3, 5, 7
CHUNK = 16


def make_inputs(num_tokens: int, *, rate: float = 0.1) -> list[Tensor]:
    """Unit keys; log alpha in [-rate, 0), beta in [0, 1)."""
    generator = torch.Generator().manual_seed(num_tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    heads = (BATCH, num_tokens, HEADS)
    q, k = (F.normalize(normal(*heads, KEY), dim=-1) for _ in range(2))
    return [
        *(q, k, normal(*heads, VALUE)),
        *(-rate * uniform(*heads), uniform(*heads)),
        normal(BATCH, HEADS, VALUE, KEY),
    ]


@pytest.mark.parametrize("implementation", ["reference", "plain"])
def test_full_strength_replaces_what_a_key_held(implementation: str) -> None:
    """beta = 1 and alpha = 1: reading the last key gives the last value, whatever was there before."""
    q, k, v, log_alpha, beta, state = make_inputs(21)
    _, last = gated_delta_rule(
        q, k, v, 0 * log_alpha, torch.ones_like(beta), state, implementation=implementation
    )
    torch.testing.assert_close(torch.einsum("bhvk,bhk->bhv", last, k[:, -1]), v[:, -1], rtol=0, atol=1e-12)


def test_with_keys_that_never_meet_it_is_a_state_space_duality() -> None:
    """Orthogonal keys erase nothing: what is left is Mamba-2's update with decay alpha (section 3.1)."""
    q, _, v, log_alpha, beta, _ = make_inputs(KEY)
    k = torch.eye(KEY, dtype=torch.float64)[:, None].expand(BATCH, KEY, HEADS, KEY)
    o, last = gated_delta_rule(q, k, v, log_alpha, beta, implementation="reference")
    for head in range(HEADS):
        one = slice(head, head + 1)
        dt = -log_alpha[:, :, one]  # with A = -1 the decay of a step; the input is divided by it
        values = v[:, :, one] * (beta[:, :, one] / dt)[..., None]
        A, D = -torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        y, state = ssd(values, dt, A, k[:, :, one], q[:, :, one], D, implementation="reference")
        torch.testing.assert_close(o[:, :, one], y, rtol=0, atol=1e-12)
        torch.testing.assert_close(last[:, one], state, rtol=0, atol=1e-12)


def test_gradients_of_the_definition_are_finite_differences() -> None:
    inputs = [tensor[:1].detach().requires_grad_() for tensor in make_inputs(3)]
    assert torch.autograd.gradcheck(lambda *args: gated_delta_rule(*args, implementation="reference"), inputs)


@pytest.mark.parametrize("rate", [1e-6, 0.1, 100.0])
def test_a_thousand_equal_keys_stay_finite_in_single_precision(rate: float) -> None:
    """The worst a chunk's system can be: all its keys the same, written at nearly full strength."""
    q, k, v, log_alpha, beta, state = (tensor.float() for tensor in make_inputs(1000, rate=rate))
    k, beta = k[:, :1].expand_as(k).contiguous(), 0.9 + 0.1 * beta
    inputs = [tensor.detach().requires_grad_() for tensor in (q, k, v, log_alpha, beta, state)]
    o, last = gated_delta_rule(*inputs, implementation="plain")
    expected, _ = gated_delta_rule(*(t.detach().double() for t in inputs), implementation="reference")
    torch.testing.assert_close(o.double(), expected, rtol=1e-4, atol=1e-4)
    for gradient in torch.autograd.grad(o.sum() + last.sum(), inputs):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("block_elements", [1, 3 * BATCH * HEADS * CHUNK**2])
def test_blocks_do_not_change_the_result(block_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(130)
    expected = gated_delta_rule(*inputs, chunk_tokens=CHUNK)
    monkeypatch.setattr(plain_module, "BLOCK_ELEMENTS", block_elements)
    for one, other in zip(gated_delta_rule(*inputs, chunk_tokens=CHUNK), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_what_training_keeps_grows_with_the_tokens_and_no_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_module, "TRAINING_BLOCK_ELEMENTS", 4 * BATCH * HEADS * CHUNK**2)

    def kept_bytes(num_tokens: int) -> int:
        sizes = {}
        inputs = [tensor.requires_grad_() for tensor in make_inputs(num_tokens)]

        def keep(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = gated_delta_rule(*inputs, chunk_tokens=CHUNK)
        assert outputs[0].requires_grad
        return sum(sizes.values())

    short, long = kept_bytes(16 * CHUNK), kept_bytes(64 * CHUNK)
    assert 0 < long <= 4.1 * short


@pytest.mark.parametrize("num_chunks", [1, 4])
def test_products_cost_what_the_docstring_of_the_layer_counts(num_chunks: int) -> None:
    """2 Q (3 K + 2 V) + 6 K V a token and head, seen by the counter, which does not see the solve."""
    inputs = make_inputs(num_chunks * CHUNK)
    with FlopCounterMode(display=False) as counter:
        gated_delta_rule(*inputs, chunk_tokens=CHUNK, implementation="plain")
    a_token = 2 * CHUNK * (3 * KEY + 2 * VALUE) + 6 * KEY * VALUE
    assert counter.get_total_flops() == BATCH * num_chunks * CHUNK * HEADS * a_token
