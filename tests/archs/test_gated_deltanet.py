"""Gated DeltaNet's layer: its definition, its start, its costs, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from archs.base import state_bytes
from archs.gated_deltanet import GatedDeltaNet
from archs.layers import initial_step_bias


def build(**more: Any) -> GatedDeltaNet:
    torch.manual_seed(0)
    mixer = GatedDeltaNet(**{"d_model": 16, "num_heads": 2, "chunk_tokens": 8, **more}).double()
    with torch.no_grad():  # every parameter off its initial value
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


def random_input(num_tokens: int, d_model: int = 16) -> Tensor:
    return torch.randn(
        2, num_tokens, d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def layer_as_published(mixer: GatedDeltaNet, x: Tensor) -> Tensor:
    """The layer written out with the published one's separate projections and convolutions, a token and
    a head at a time (arXiv 2412.06464, section 3.4; fla-org/flash-linear-attention,
    fla/layers/gated_deltanet.py)."""
    H, K, V = mixer.num_heads, mixer.head_width, mixer.value_width
    parts = mixer.in_proj.weight.split((H * K, H * K, H * V, H * V, H, H))
    q, k, v, g, a, b = (F.linear(x, weight) for weight in parts)
    filters = mixer.conv1d.conv.weight.split((H * K, H * K, H * V))

    def convolved(t: Tensor, taps: Tensor) -> Tensor:
        padded = F.pad(t.mT, (mixer.conv1d.width - 1, 0))
        return F.silu(F.conv1d(padded, taps, groups=len(taps))).mT

    q, k, v = (convolved(t, taps) for t, taps in zip((q, k, v), filters, strict=True))
    alpha = torch.exp(-mixer.A_log.exp() * F.softplus(a + mixer.dt_bias))
    beta = torch.sigmoid(b)
    rows = []
    for row in range(x.shape[0]):
        heads = []
        for h in range(H):
            keys, values = slice(h * K, (h + 1) * K), slice(h * V, (h + 1) * V)
            S, outputs = x.new_zeros(V, K), []
            for t in range(x.shape[1]):
                q_t, k_t = (z[row, t, keys] / (z[row, t, keys].square().sum() + 1e-6).sqrt() for z in (q, k))
                strength = beta[row, t, h]
                erase = torch.eye(K, dtype=x.dtype) - strength * torch.outer(k_t, k_t)
                S = alpha[row, t, h] * S @ erase + strength * torch.outer(v[row, t, values], k_t)
                o = S @ q_t / K**0.5
                o = o / (o.square().mean() + 1e-5).sqrt() * mixer.norm.weight
                outputs.append(o * F.silu(g[row, t, values]))
            heads.append(torch.stack(outputs))
        rows.append(torch.cat(heads, dim=-1))
    return F.linear(torch.stack(rows), mixer.out_proj.weight)


@pytest.mark.parametrize("implementation", ["plain", "reference"])
@pytest.mark.parametrize("more", [{}, {"head_width": 5, "expand_v": 1.4, "conv_width": 3}], ids=str)
def test_the_layer_is_the_published_one(implementation: str, more: dict) -> None:
    mixer, x = build(implementation=implementation, **more), random_input(21)
    torch.testing.assert_close(mixer(x), layer_as_published(mixer, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("implementation", ["plain", "reference"])
def test_a_layer_in_pieces_is_the_layer(implementation: str) -> None:
    mixer, x = build(implementation=implementation), random_input(41)
    with torch.no_grad():
        whole, state = mixer(x), mixer.init_state(2, 41)
        first, state = mixer.prefill(x[:, :1], state)
        second, state = mixer.prefill(x[:, 1:36], state)
        pieces = [first, second]
        for t in range(36, 41):
            y, state = mixer.decode(x[:, t], state)
            pieces.append(y[:, None])
    assert state.num_tokens == 41
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-12)


def test_the_published_sizes() -> None:
    """d_model 2048, 6 heads of 256 and 512: about 6 D^2 parameters (fla's layer says so of itself)."""
    with torch.device("meta"):
        mixer = GatedDeltaNet(d_model=2048, num_heads=6)
    assert (mixer.head_width, mixer.value_width) == (256, 512)
    num_parameters = sum(p.numel() for p in mixer.parameters())
    assert num_parameters == pytest.approx(6 * 2048**2, rel=0.01)
    assert mixer.state_bytes_at(1, 1) == 4 * (6 * 256 * 512 + 4 * 6 * (2 * 256 + 512))


def test_it_starts_as_published() -> None:
    torch.manual_seed(0)
    mixer = GatedDeltaNet(d_model=64, num_heads=2000, head_width=1)
    steps, rates = F.softplus(mixer.dt_bias), mixer.A_log.exp()
    assert 0.00099 < steps.min() < 0.0011 and 0.09 < steps.max() < 0.101
    assert rates.min() < 0.1 and 15.9 < rates.max() < 16.001
    assert (mixer.norm.weight == 1).all()
    mixer = GatedDeltaNet(
        d_model=64, num_heads=2000, head_width=1, start_steps=(0.5, 2.0), start_decays=(1.0, 2.0)
    )
    steps, rates = F.softplus(mixer.dt_bias), mixer.A_log.exp()
    assert steps.min() > 0.499 and steps.max() < 2.001 and rates.min() > 0.999 and rates.max() < 2.001


def test_a_decay_rate_of_zero_can_still_be_trained() -> None:
    mixer = GatedDeltaNet(d_model=16, num_heads=2, start_decays=(0.0, 1e-30))
    mixer(torch.randn(1, 5, 16)).sum().backward()
    assert mixer.A_log.isfinite().all() and mixer.A_log.grad is not None
    assert (mixer.A_log.grad != 0).all()


def test_a_step_bias_is_the_inverse_of_softplus() -> None:
    torch.testing.assert_close(F.softplus(initial_step_bias(3, (0.25, 0.25))), torch.full((3,), 0.25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_state_is_predicted_and_never_grows(dtype: torch.dtype) -> None:
    mixer = build().to(dtype)
    state = mixer.init_state(3, 1000)
    assert state_bytes(state) == mixer.state_bytes_at(3, 1000) == mixer.state_bytes_at(3, 10)
    with torch.no_grad():
        _, state = mixer.prefill(torch.randn(3, 20, 16, dtype=dtype), state)
        _, state = mixer.decode(torch.randn(3, 16, dtype=dtype), state)
    assert state_bytes(state) == mixer.state_bytes_at(3, 20)
    assert state.memory.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("num_tokens", [64, 41, 3])
def test_products_hold_against_a_counter(num_tokens: int) -> None:
    mixer = build().float()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        mixer(torch.randn(1, num_tokens, 16))
    formula = mixer.flops(num_tokens, "prefill").matmul
    assert counter.get_total_flops() == pytest.approx(formula, rel=0.001)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        mixer.decode(torch.randn(1, 16), mixer.init_state(1, 1))
    assert counter.get_total_flops() == pytest.approx(mixer.flops(1, "decode").matmul, rel=0.001)


def test_costs_of_the_published_layer() -> None:
    """The arithmetic of the layer a token, d = 2048, 6 heads, K = 256, V = 512, Q = 64."""
    with torch.device("meta"):
        mixer = GatedDeltaNet(d_model=2048, num_heads=6)
    d, heads, K, V, chunk = 2048, 6, 256, 512, 64
    layer = 2 * d * heads * (2 * K + 3 * V + 2) + 2 * 4 * heads * (2 * K + V)
    products = heads * (2 * chunk * (3 * K + 2 * V) + 6 * K * V)
    assert mixer.flops(1024, "prefill").matmul == 1024 * (layer + products)
    scan = heads * (chunk**2 + 4 * chunk + 2 * K * V / chunk)
    assert mixer.flops(1024, "prefill").scan == 1024 * scan
    assert mixer.flops(1024, "decode").total == layer + 7 * heads * K * V


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 0}, "num_heads=0 must be positive"),
        ({"num_heads": 5}, r"num_heads=5 must divide 0.75 \* d_model = 12"),
        ({"chunk_tokens": 0}, "chunk_tokens=0 must be positive"),
        ({"head_width": 0}, "head_width=0 and expand_v=2.0 must make positive"),
        ({"head_width": 3, "expand_v": 1.5}, "head_width=3 and expand_v=1.5 must make"),
        ({"expand_v": 0.0}, "expand_v=0.0 must make"),
        ({"conv_width": 0}, "width=0 must be positive"),
        ({"start_steps": (0.0, 1.0)}, r"start_steps=\[0.0, 1.0\] must be"),
        ({"start_steps": (1.0, 0.5)}, r"start_steps=\[1.0, 0.5\] must be"),
        ({"start_decays": (1.0,)}, r"start_decays=\[1.0\] must be"),
        ({"start_decays": (0.0, 0.0)}, r"start_decays=\[0.0, 0.0\] must be"),
        ({"start_decays": (-1.0, 1.0)}, r"start_decays=\[-1.0, 1.0\] must be"),
    ],
)
def test_impossible_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GatedDeltaNet(**{"d_model": 16, "num_heads": 2, **changes})
