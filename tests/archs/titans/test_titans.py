"""Titans: parity, causality, state and operation counts, for all four and the sliding window."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from archs.base import Mixer, clone_state, state_bytes
from archs.implementations import resolve_implementations
from archs.ops.operation import ImplementationUnavailable
from archs.sliding_window import SlidingWindowAttention
from archs.titans.lmm import TitansLMM
from archs.titans.mac import TitansMAC
from archs.titans.window import TitansMAG, TitansMAL

MEMORY = dict(d_model=16, num_heads=2, memory_depth=2, chunk_tokens=4)
ATTENTION = dict(num_persistent_tokens=3)
FACTORIES: dict[str, Callable[..., Mixer]] = {
    "lmm": lambda **more: TitansLMM(**{**MEMORY, **more}),
    "mac": lambda **more: TitansMAC(**{**MEMORY, **ATTENTION, "segment_tokens": 8, **more}),
    "mag": lambda **more: TitansMAG(**{**MEMORY, **ATTENTION, "window_tokens": 5, **more}),
    "mal": lambda **more: TitansMAL(**{**MEMORY, **ATTENTION, "window_tokens": 5, **more}),
    "window": lambda **more: SlidingWindowAttention(
        **{**dict(d_model=16, num_heads=4, num_kv_heads=2, window_tokens=5, conv_width=4), **more}
    ),
}
TITANS = ("lmm", "mac", "mag", "mal")


def build(name: str, **more: object) -> Mixer:
    torch.manual_seed(0)
    mixer = FACTORIES[name](**more).double()
    with torch.no_grad():  # every parameter off its initial value
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


def random_input(num_tokens: int, d_model: int = 16) -> torch.Tensor:
    return torch.randn(
        2, num_tokens, d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def run_in_pieces(mixer: Mixer, x: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    """Prefill of each cut; a cut of 0 is a decode step."""
    state, first, outputs = mixer.init_state(x.shape[0], x.shape[1]), 0, []
    with torch.no_grad():
        for cut in cuts:
            if cut == 0:
                y, state = mixer.decode(x[:, first], state)
                y = y[:, None]
            else:
                y, state = mixer.prefill(x[:, first : first + cut], state)
            outputs.append(y)
            first += max(cut, 1)
            assert state.num_tokens == first
    assert state_bytes(state) == mixer.state_bytes_at(x.shape[0], x.shape[1])
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("num_tokens", [1, 3, 23])
def test_any_chunking_and_single_steps_equal_the_full_forward(name: str, num_tokens: int) -> None:
    mixer, x = build(name), random_input(num_tokens)
    expected = mixer(x)
    cuts = [[num_tokens], [0] * num_tokens]
    if num_tokens == 23:
        cuts += [[5, 0, 7, 0, 9], [8, 8, 7], [1, 15, 7], [4, 4, 0, 1, 13]]
    for some in cuts:
        torch.testing.assert_close(run_in_pieces(mixer, x, some), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", TITANS)
@pytest.mark.parametrize(
    "more",
    [
        dict(conv_width=0, use_momentum=False),
        dict(chunk_tokens=1, use_decay=False),
        dict(memory_depth=1),
        dict(memory_depth=3, chunk_tokens=8),
    ],
    ids=str,
)
def test_parity_holds_for_other_settings(name: str, more: dict) -> None:
    mixer, x = build(name, **more), random_input(19)
    for cuts in ([0] * 19, [3, 16]):
        torch.testing.assert_close(run_in_pieces(mixer, x, cuts), mixer(x), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", FACTORIES)
def test_no_future_token_and_no_other_row_changes_an_output(name: str) -> None:
    mixer, x = build(name), random_input(21)
    expected = mixer(x)
    for position in range(1, 21):
        changed = x.clone()
        changed[0, position:] = 7.0
        y = mixer(changed)
        torch.testing.assert_close(y[0, :position], expected[0, :position], atol=1e-9, rtol=0)
        torch.testing.assert_close(y[1], expected[1], atol=1e-9, rtol=0)
        assert not torch.allclose(y[0, position], expected[0, position])


@pytest.mark.parametrize("name", TITANS)
def test_an_early_token_reaches_the_end_through_the_memory(name: str) -> None:
    mixer, x = build(name, conv_width=0), random_input(40)
    changed = x.clone()
    changed[:, 2] += 1.0
    assert (mixer(changed)[:, -1] - mixer(x)[:, -1]).abs().max() > 1e-9


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("gate_bias", [-2.0, 0.0, 4.0])
def test_repeated_tokens_do_not_make_the_memory_overshoot(depth: int, gate_bias: float) -> None:
    mixer = build("lmm", memory_depth=depth, chunk_tokens=16)
    with torch.no_grad():
        mixer.memory.gates.bias[2:] = gate_bias  # step size and momentum of both heads
        x = random_input(1)[:, :1].expand(-1, 800, -1)
        _, state = mixer.prefill(x, mixer.init_state(2, 800))
    assert max(w.abs().max() for w in state.memory.weights) < 3


def test_a_window_forgets() -> None:
    mixer, x = build("window", conv_width=0), random_input(12)
    changed = x.clone()
    changed[:, 3] += 1.0
    difference = (mixer(changed) - mixer(x)).abs().amax(dim=(0, 2))
    assert (difference[3:8] > 1e-6).all() and difference[8:].max() == 0


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("context_tokens", [1, 3, 5, 100])
def test_state_bytes_are_as_predicted(name: str, dtype: torch.dtype, context_tokens: int) -> None:
    mixer = FACTORIES[name]().to(dtype)
    state = mixer.init_state(3, context_tokens)
    assert state_bytes(state) == mixer.state_bytes_at(3, context_tokens)
    assert mixer.state_bytes_at(1, 100) == mixer.state_bytes_at(1, 10_000)


@pytest.mark.parametrize("name", FACTORIES)
def test_gradients_are_finite_and_reach_every_parameter(name: str) -> None:
    mixer = build(name)
    mixer(random_input(19)).square().sum().backward()
    for parameter_name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", FACTORIES)
def test_under_autocast_the_memory_keeps_its_precision(name: str) -> None:
    mixer, x = build(name).float(), random_input(19).float()
    expected = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
        y.float().square().sum().backward()
    torch.testing.assert_close(y.float(), expected, atol=0.05 * expected.abs().max().item(), rtol=0)
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize("name", FACTORIES)
def test_half_precision_weights_run_every_phase(name: str) -> None:
    mixer, x = build(name).bfloat16(), random_input(19).bfloat16()
    y = run_in_pieces(mixer, x, [5, 0, 13])
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, mixer(x), atol=0.1 * y.abs().max().item(), rtol=0)


@pytest.mark.parametrize("name", TITANS)
def test_reference_and_plain_give_the_same_gradients(name: str) -> None:
    key = "implementation" if name == "lmm" else "memory_implementation"
    gradients = []
    for implementation in ("reference", "plain"):
        mixer = build(name, **{key: implementation})
        mixer(random_input(10)).square().sum().backward()
        gradients.append([p.grad for p in mixer.parameters()])
    torch.testing.assert_close(*gradients, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", FACTORIES)
def test_a_branch_of_the_state_is_independent(name: str) -> None:
    mixer, x = build(name), random_input(12)
    with torch.no_grad():
        _, state = mixer.prefill(x[:, :6], mixer.init_state(2, 12))
        branch = clone_state(state)
        mixer.prefill(10 * x[:, 6:], branch)
        y, _ = mixer.prefill(x[:, 6:], state)
    torch.testing.assert_close(y, mixer(x)[:, 6:], atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", FACTORIES)
def test_a_state_without_room_is_refused(name: str) -> None:
    mixer = build(name)
    if name == "lmm":
        pytest.skip("its state has no room to run out of")
    with pytest.raises(ValueError, match="room for 4 tokens and was given 6"):
        mixer.prefill(random_input(6), mixer.init_state(2, 4))


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize(("depth", "chunk_tokens"), [(1, 8), (2, 8), (4, 8), (1, 32)])
def test_flops_agree_with_a_counter(name: str, depth: int, chunk_tokens: int) -> None:
    more = dict(attention_implementation="plain", memory_depth=depth, d_model=32, chunk_tokens=chunk_tokens)
    if name == "mac":
        more["segment_tokens"] = max(8, chunk_tokens)
    elif name == "lmm":
        del more["attention_implementation"]
    elif name == "window":
        more = dict(implementation="plain")
    mixer = build(name, **more)
    x = random_input(48, 16 if name == "window" else 32)[:1]
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            mixer(x)
        flops = mixer.flops(48, "prefill")
        assert counter.get_total_flops() == pytest.approx(flops.matmul + flops.attention_square, rel=1e-3)
        _, state = mixer.prefill(x[:, :44], mixer.init_state(1, 48))
        with FlopCounterMode(display=False) as counter:
            mixer.decode(x[:, 44], state)
    flops = mixer.flops(45, "decode")
    assert counter.get_total_flops() == pytest.approx(flops.matmul + flops.attention_square, rel=1e-3)


def test_mac_attention_names_agree_and_no_other_name_falls_back() -> None:
    x, expected = random_input(21), None
    for name, runs in (("reference", "reference"), ("plain", "plain"), ("sdpa", "sdpa"), ("auto", "sdpa")):
        mixer = build("mac", attention_implementation=name)
        with torch.no_grad():
            y = mixer(x)
        expected = y if expected is None else expected
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        used = resolve_implementations(mixer, x.device)
        assert used == {"neural_memory": "plain", "segment_attention": runs}
    for name in ("triton", "flash_attn"):
        mixer = build("mac", attention_implementation=name)
        sentence = (
            f"segment_attention has no implementation '{name}'; choose one of auto, reference, plain, sdpa"
        )
        with pytest.raises(ImplementationUnavailable, match=sentence):
            resolve_implementations(mixer, x.device)
        with pytest.raises(ImplementationUnavailable, match=sentence):
            mixer(x)


def test_the_implementations_of_both_parts_are_recorded() -> None:
    names = dict(memory_implementation="reference", attention_implementation="plain")
    expected = {"neural_memory": "reference", "attention": "plain"}
    assert resolve_implementations(build("mag", **names), torch.device("cpu")) == expected


@pytest.mark.parametrize("name", ["mag", "mal"])
def test_a_steps_own_implementation_is_recorded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = dict(memory_implementation="plain", attention_implementation="sdpa")
    mixer = build(name, **names, attention_step_implementation="plain")
    expected = {"neural_memory": "plain", "attention": "sdpa", "attention_step": "plain"}
    assert resolve_implementations(mixer, torch.device("cpu")) == expected
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    mixer = build(name, **names, attention_step_implementation="triton")
    with pytest.raises(ImplementationUnavailable, match=r"of attention_step runs on cuda only"):
        resolve_implementations(mixer, torch.device("cpu"))


def test_attention_pairs_of_mac_follow_the_causal_rule() -> None:
    """Mean pairs a token: persistent tokens and the segment (retrieved and own, half of each)."""
    flops = build("mac").flops(800, "prefill")
    assert flops.attention == pytest.approx(4 * 16 * 800 * (3 + 8 + 1))


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("lmm", dict(num_heads=3), "num_heads=3 must divide d_model=16"),
        ("lmm", dict(memory_depth=5), "memory_depth=5"),
        ("lmm", dict(max_step_size=0.0), "max_step_size=0.0"),
        ("lmm", dict(chunk_tokens=0), "chunk_tokens=0"),
        ("mac", dict(segment_tokens=6), "segment_tokens=6 must be a multiple of chunk_tokens=4"),
        ("mag", dict(window_tokens=0), "window_tokens=0"),
        ("mal", dict(num_persistent_tokens=-1), "num_persistent_tokens=-1"),
        ("window", dict(num_kv_heads=3), "num_kv_heads=3 must divide num_heads=4"),
        ("window", dict(num_heads=8, num_persistent_tokens=1), "a multiple of 4"),
    ],
)
def test_mistakes_are_named(name: str, more: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FACTORIES[name](**more)
