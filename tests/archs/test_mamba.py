"""Mamba and Mamba-2 as layers: published sizes, start values, costs, states and refusals. What every
architecture keeps is in test_contract.py."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from archs.base import Mixer, state_bytes
from archs.decoder import Decoder
from archs.mamba import Mamba, Mamba2

SmallMamba2 = partial(Mamba2, state_width=16, head_width=8, chunk_tokens=16)
MIXERS = pytest.mark.parametrize("make", [Mamba, SmallMamba2], ids=["mamba", "mamba2"])


@pytest.mark.parametrize(
    ("mixer", "vocab_size", "num_layers", "d_model", "num_parameters"),
    [
        (Mamba, 50280, 24, 768, 129_135_360),
        (Mamba, 50280, 48, 1024, 371_516_416),
        (Mamba, 50280, 48, 2048, 1_372_178_432),
        (Mamba2, 50288, 24, 768, 128_989_632),
    ],
)
def test_published_parameter_counts(
    mixer: type[Mixer], vocab_size: int, num_layers: int, d_model: int, num_parameters: int
) -> None:
    with torch.device("meta"):
        model = Decoder(vocab_size=vocab_size, d_model=d_model, num_layers=num_layers, d_ff=0, mixers=[mixer])
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


def test_the_step_size_starts_between_a_thousandth_and_a_tenth() -> None:
    for bias in (Mamba(d_model=256).dt_proj.bias, Mamba2(d_model=256, head_width=1).dt_bias):
        step = torch.nn.functional.softplus(bias)
        assert step.min() > 0.00099 and step.max() < 0.101
        assert 0.005 < step.log().mean().exp() < 0.02, "log-uniform: the middle is 0.01"


def test_step_sizes_stay_within_their_limits() -> None:
    """Beyond the limit it does not matter how far."""
    layer = SmallMamba2(d_model=16, step_limits=(0.0, 0.05))
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
        layer.dt_bias.fill_(20.0)
        limited = layer(x)
        layer.dt_bias.fill_(30.0)
        torch.testing.assert_close(layer(x), limited)
        layer.step_limits = (0.0, 0.1)
        assert (layer(x) - limited).abs().max() > 1e-5


def test_the_gated_norm_is_over_each_of_its_groups() -> None:
    y, gate = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 32)
    for num_norm_groups, num_parts in ((None, 2), (1, 1), (4, 4)):
        layer = SmallMamba2(d_model=16, num_groups=2, num_norm_groups=num_norm_groups, norm_eps=0.1)
        layer.out_proj = torch.nn.Identity()
        gated = y.flatten(2) * torch.nn.functional.silu(gate)
        parts = [
            part / (part.square().mean(-1, keepdim=True) + 0.1).sqrt() for part in gated.chunk(num_parts, -1)
        ]
        torch.testing.assert_close(layer._output(y, gate), torch.cat(parts, -1))


def test_another_start_than_the_published_one() -> None:
    torch.manual_seed(0)
    usual = Mamba(d_model=32)
    torch.manual_seed(0)
    layer = Mamba(d_model=32, start_steps=(0.5, 2.0), start_decay=0.5, start_skip=0.25, start_maps=3.0)
    steps = torch.nn.functional.softplus(layer.dt_proj.bias)
    assert steps.min() > 0.499 and steps.max() < 2.01
    torch.testing.assert_close(layer.A_log.exp(), 0.5 * usual.A_log.exp())
    assert (layer.D == 0.25).all()
    rows = layer.dt_rank
    torch.testing.assert_close(layer.x_proj.weight[:rows], usual.x_proj.weight[:rows])
    torch.testing.assert_close(layer.x_proj.weight[rows:], 3 * usual.x_proj.weight[rows:])
    layer2 = SmallMamba2(d_model=256, start_steps=(0.5, 2.0), start_decays=(0.1, 0.2), start_skip=0.0)
    steps, rates = torch.nn.functional.softplus(layer2.dt_bias), layer2.A_log.exp()
    assert steps.min() > 0.499 and steps.max() < 2.01
    assert rates.min() > 0.099 and rates.max() < 0.201 and (layer2.D == 0).all()


@pytest.mark.parametrize(
    ("make", "settings", "name"),
    [
        (Mamba, {"start_steps": (0.0, 1.0)}, "start_steps"),
        (Mamba, {"start_steps": (1.0, 0.5)}, "start_steps"),
        (Mamba, {"start_decay": 0.0}, "start_decay"),
        (SmallMamba2, {"start_decays": (1.0,)}, "start_decays"),
    ],
)
def test_a_start_that_makes_no_sense_is_refused(make: type[Mixer], settings: dict, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=.* must be"):
        make(d_model=32, **settings)


def test_decays_start_as_published() -> None:
    rates = Mamba(d_model=16, state_width=5).A_log.exp()
    torch.testing.assert_close(rates, torch.arange(1.0, 6).repeat(32, 1))
    rates = Mamba2(d_model=256, head_width=1).A_log.exp()
    assert rates.min() >= 0.999 and rates.max() <= 16.001


def test_heads_are_given_by_width_or_by_number() -> None:
    assert Mamba2(d_model=64, head_width=16).num_heads == 8
    assert Mamba2(d_model=22, num_heads=4).head_width == 11


@MIXERS
@pytest.mark.parametrize("implementation", ["plain", "reference"])
def test_a_layer_in_pieces_is_the_layer(make: type[Mixer], implementation: str) -> None:
    torch.manual_seed(0)
    mixer = make(d_model=16, implementation=implementation).double()
    x = torch.randn(2, 41, 16, dtype=torch.float64)
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


@MIXERS
def test_implementations_agree(make: type[Mixer]) -> None:
    torch.manual_seed(0)
    plain = make(d_model=16, implementation="plain").double()
    reference = make(d_model=16, implementation="reference").double()
    reference.load_state_dict(plain.state_dict())
    x = torch.randn(2, 37, 16, dtype=torch.float64)
    torch.testing.assert_close(plain(x), reference(x), rtol=0, atol=1e-12)


def test_groups_have_a_norm_of_their_own() -> None:
    """Scaling one group's output leaves the other's norm alone."""
    mixer = SmallMamba2(d_model=16, num_groups=2).double()
    mixer.out_proj = torch.nn.Identity()
    y = torch.randn(1, 3, 4, 8, dtype=torch.float64)
    gate = torch.randn(1, 3, 32, dtype=torch.float64)
    louder = torch.cat((y[:, :, :2] * 5, y[:, :, 2:]), dim=2)
    before, after = mixer._output(y, gate), mixer._output(louder, gate)
    torch.testing.assert_close(after[..., 16:], before[..., 16:], rtol=0, atol=1e-12)


@MIXERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_state_is_predicted_and_never_grows(make: type[Mixer], dtype: torch.dtype) -> None:
    mixer = make(d_model=16).to(dtype)
    state = mixer.init_state(3, 1000)
    assert state_bytes(state) == mixer.state_bytes_at(3, 1000) == mixer.state_bytes_at(3, 10)
    with torch.no_grad():
        _, state = mixer.prefill(torch.randn(3, 20, 16, dtype=dtype), state)
        _, state = mixer.decode(torch.randn(3, 16, dtype=dtype), state)
    assert state_bytes(state) == mixer.state_bytes_at(3, 20)
    assert state.hidden.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_state_of_the_published_130m() -> None:
    with torch.device("meta"):
        assert Mamba(d_model=768).state_bytes_at(1, 1) == 4 * (1536 * 16 + 4 * 1536)
        assert Mamba2(d_model=768).state_bytes_at(1, 1) == 4 * (1536 * 128 + 4 * (1536 + 2 * 128))


@MIXERS
@pytest.mark.parametrize("num_tokens", [64, 41])
def test_products_hold_against_a_counter(make: type[Mixer], num_tokens: int) -> None:
    mixer = make(d_model=32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        mixer(torch.randn(1, num_tokens, 32))
    formula = mixer.flops(num_tokens, "prefill").matmul
    assert counter.get_total_flops() == pytest.approx(formula, rel=0.001)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        mixer.decode(torch.randn(1, 32), mixer.init_state(1, 1))
    assert counter.get_total_flops() == pytest.approx(mixer.flops(1, "decode").matmul, rel=0.001)


def test_costs_of_the_published_layers() -> None:
    """The arithmetic of the layer a token, d = 768, D = 1536."""
    with torch.device("meta"):
        mamba, mamba2 = Mamba(d_model=768), Mamba2(d_model=768)
    d, inner, r, n = 768, 1536, 48, 16
    expected = 12 * d**2 + 2 * inner * (r + 2 * n) + 2 * r * inner + 8 * inner + 9 * inner * n
    assert mamba.flops(1024, "prefill").total == 1024 * expected
    assert mamba.flops(1024, "decode").total == expected
    n, heads, chunk = 128, 24, 256
    layer = 2 * d * (2 * inner + 2 * n + heads) + 2 * inner * d + 8 * (inner + 2 * n)
    products = 2 * chunk * n + 2 * chunk * inner + 4 * n * inner
    assert mamba2.flops(1024, "prefill").matmul == 1024 * (layer + products)
    assert mamba2.flops(1024, "decode").total == layer + 6 * n * inner


def test_training_lowers_the_loss_on_a_repeated_token_stream() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 11, (2, 9)).repeat(1, 4)
    for mixer in (Mamba, SmallMamba2):
        model = Decoder(vocab_size=11, d_model=16, num_layers=1, d_ff=0, mixers=[mixer])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(40):
            loss = model.loss(tokens[:, :-1], tokens[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (Mamba2, {"d_model": 48, "head_width": 64}, "head_width=64 must divide expand \\* d_model = 96"),
        (Mamba2, {"d_model": 48, "num_heads": 5}, "num_heads=5 must divide expand \\* d_model = 96"),
        (Mamba2, {"d_model": 48, "num_heads": 0}, "num_heads=0 must divide expand \\* d_model = 96"),
        (Mamba2, {"d_model": 64, "num_groups": 3}, "num_groups=3 must divide the 2 heads"),
        (Mamba2, {"d_model": 64, "chunk_tokens": 0}, "chunk_tokens=0 must be positive"),
        (Mamba2, {"d_model": 64, "num_norm_groups": 3}, "num_norm_groups=3 must divide the inner width 128"),
        (Mamba2, {"d_model": 64, "step_limits": (0.1, 0.1)}, r"step_limits=\[0.1, 0.1\] must be two numbers"),
        (Mamba, {"d_model": 64, "inner_width": 0}, "inner_width=0 must be positive"),
        (Mamba, {"d_model": 0}, "d_model=0 must be positive"),
        (Mamba, {"d_model": 64, "dt_rank": -1}, "dt_rank=-1 must be positive"),
        (Mamba, {"d_model": 64, "conv_width": 0}, "width=0 must be positive"),
    ],
)
def test_impossible_sizes_are_named(make: type[Mixer], arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)
