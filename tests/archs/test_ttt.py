"""The TTT layers: the published model's numbers, sizes, state and arithmetic."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from archs.base import state_bytes
from archs.decoder import Decoder
from archs.layers import ShortConvolution, rotary
from archs.ttt import TTTMLP, TTTLinear, TTTMixer

GOLDENS = Path(__file__).resolve().parent.parent / "goldens"
LAYERS = {"linear": TTTLinear, "mlp": TTTMLP}
# Published name of a parameter -> ours, tried in order; {ttt} is the layer's place in its block.
RENAMES = [
    ("model.embed_tokens.", "embedding."),
    ("model.layers.", "blocks."),
    ("model.norm.", "norm."),
    ("seq_modeling_block.conv_q.", "mixers.{ttt}.conv_q.conv."),
    ("seq_modeling_block.conv_k.", "mixers.{ttt}.conv_k.conv."),
    ("seq_modeling_block.", "mixers.{ttt}."),
    ("seq_norm.", "mixer_norms.{ttt}."),
    (".conv.norm.", ".mixer_norms.0."),
    (".conv.conv.", ".mixers.0.conv.conv."),
    ("ffn_norm.", "feed_forward_norm."),
    (".mlp.", ".feed_forward."),
]


def published(name: str) -> tuple[Decoder, Tensor, Tensor]:
    """A checkpoint of the published implementation, its tokens and logits."""
    config = json.loads((GOLDENS / name / "config.json").read_text())
    mixer = partial(
        LAYERS[config["ttt_layer_type"]],
        num_heads=config["num_attention_heads"],
        mini_batch_tokens=config["mini_batch_size"],
        base_lr=config["ttt_base_lr"],
        share_qk=config["share_qk"],
        use_gate=config["use_gate"],
    )
    model = Decoder(
        vocab_size=config["vocab_size"],
        d_model=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        d_ff=config["intermediate_size"],
        mixers=[mixer],
        pre_mixer=ShortConvolution if config["pre_conv"] else None,
    )
    weights = {}
    for key, value in load_file(GOLDENS / name / "model.safetensors").items():
        for old, new in RENAMES:
            if "seq_modeling_block" in old or "mixers" not in key:
                key = key.replace(old, new.format(ttt=int(config["pre_conv"])))
        weights[key] = value
    weights["head.weight"] = weights["embedding.weight"]
    model.load_state_dict(weights, strict=True)
    expected = load_file(GOLDENS / name / "expected.safetensors")
    return model, expected["tokens"].long(), expected["logits"]


@pytest.mark.parametrize("name", ["ttt_linear", "ttt_mlp", "ttt_linear_mamba_backbone"])
@torch.no_grad()
def test_agrees_with_the_published_implementation(name: str) -> None:
    model, tokens, expected = published(name)
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=2e-4)
    state, outputs = model.init_state(2, tokens.shape[1]), []
    for size in (5, 17, 1, 33):
        start = state.num_tokens
        logits, state = model.prefill(tokens[:, start : start + size], state, num_logits=size)
        outputs.append(logits)
    for token in tokens[:, state.num_tokens :].unbind(1):
        logits, state = model.decode(token, state)
        outputs.append(logits[:, None])
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("layer", "num_parameters"), [(TTTLinear, 110_424_144), (TTTMLP, 114_589_776)])
def test_has_the_published_number_of_parameters_at_125m(layer: type[TTTMixer], num_parameters: int) -> None:
    with torch.device("meta"):
        model = Decoder(
            vocab_size=32_000,
            d_model=768,
            num_layers=12,
            d_ff=2048,
            mixers=[partial(layer, num_heads=12)],
            pre_mixer=ShortConvolution,
        )
    assert sum(p.numel() for p in model.parameters()) == num_parameters


def new_layer(layer: type[TTTMixer], **settings: object) -> TTTMixer:
    torch.manual_seed(0)
    mixer = layer(d_model=16, num_heads=2, **settings).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return mixer


@pytest.mark.parametrize(("layer", "per_head"), [(TTTLinear, 8 * 8 + 8), (TTTMLP, 8 * 8 * 8 + 5 * 8)])
@pytest.mark.parametrize("share_qk", [False, True])
def test_state_is_weights_gradients_and_tails(layer: type[TTTMixer], per_head: int, share_qk: bool) -> None:
    mixer = new_layer(layer, share_qk=share_qk).float()
    inner, tails = 3 * 2 * 2 * per_head * 4, 3 * 2 * 16 * 4 * 4 * share_qk
    state = mixer.init_state(3, 100)
    assert mixer.state_bytes_at(3, 100) == state_bytes(state) == inner + tails
    with torch.no_grad():
        _, state = mixer.prefill(torch.randn(3, 37, 16), state)
    assert state_bytes(state) == inner + tails


@pytest.mark.parametrize("layer", [TTTLinear, TTTMLP])
@pytest.mark.parametrize("use_backbone", [False, True])
@torch.no_grad()
def test_matrix_flops_are_those_that_run(layer: type[TTTMixer], use_backbone: bool) -> None:
    mixer = new_layer(layer, share_qk=use_backbone, use_gate=use_backbone)
    for num_tokens in (32, 48, 39, 5):
        with FlopCounterMode(display=False) as counter:
            mixer.prefill(torch.randn(1, num_tokens, 16).double(), mixer.init_state(1, num_tokens))
        assert counter.get_total_flops() == mixer.flops(num_tokens, "prefill").matmul
    with FlopCounterMode(display=False) as counter:
        mixer.decode(torch.randn(1, 16).double(), mixer.init_state(1, 1))
    assert counter.get_total_flops() == mixer.flops(7, "decode").matmul


@pytest.mark.parametrize(("layer", "published_inner"), [(TTTLinear, 6 * 80), (TTTMLP, 56 * 64 + 30 * 16)])
def test_flops_are_near_the_published_arithmetic(layer: type[TTTMixer], published_inner: float) -> None:
    """6 D (K + b) and D (56 K + 30 b) a token: merging the biases with the weights saves a little."""
    d_model, num_tokens = 768, 2048
    with torch.device("meta"):
        mixer = layer(d_model=d_model, num_heads=12, share_qk=False, use_gate=False)
    per_token = mixer.flops(num_tokens, "prefill").matmul / num_tokens
    published = 8 * d_model**2 + d_model * published_inner
    assert 0.95 * published < per_token < 1.01 * published


@pytest.mark.parametrize("layer", [TTTLinear, TTTMLP])
def test_implementations_agree_through_the_layer(layer: type[TTTMixer]) -> None:
    plain, reference = (new_layer(layer, implementation=name) for name in ("plain", "reference"))
    x = torch.randn(2, 37, 16, dtype=torch.float64)
    gradients = []
    for mixer in (plain, reference):
        y = mixer(x)
        gradients.append(torch.autograd.grad(y.square().sum(), list(mixer.parameters())))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-8, atol=1e-10)
    assert all(gradient.abs().max() > 0 for gradient in gradients[0]), "every parameter is learned"


def test_the_inner_model_learns_to_reconstruct() -> None:
    """On one repeated token, f(k) comes closer to v with every mini-batch."""
    mixer = new_layer(TTTLinear, share_qk=False, use_gate=False)
    x = torch.randn(1, 1, 16, dtype=torch.float64).expand(1, 96, 16)
    with torch.no_grad():
        mixer.q_proj.weight.copy_(mixer.k_proj.weight)
        mixer.post_norm, mixer.o_proj = torch.nn.Identity(), torch.nn.Identity()
        distance = (mixer(x) - mixer.v_proj(x)).norm(dim=-1)[0]
    at_ends = distance[15::16]  # the same rotary position in each mini-batch
    assert (at_ends.diff() < 0).all(), at_ends


def test_base_lr_is_warmed_up_for_the_mlp_only() -> None:
    mlp, linear = new_layer(TTTMLP), new_layer(TTTLinear)
    assert mlp.base_lr_scale == 1.0, "a model that is not being trained uses the full step size"
    scales = []
    for fraction in (0.0, 0.5, 1.0):
        mlp.set_training_progress(fraction)
        linear.set_training_progress(fraction)
        scales.append(mlp.base_lr_scale)
        assert linear.base_lr_scale == 1.0
    assert scales == pytest.approx([0.1, 0.55, 1.0])
    assert not any("base_lr" in key for key in mlp.state_dict())


def test_the_step_size_changes_the_output() -> None:
    mixer = new_layer(TTTMLP)
    x = torch.randn(1, 20, 16, dtype=torch.float64)
    with torch.no_grad():
        full = mixer(x)
        mixer.set_training_progress(0.0)
        assert not torch.allclose(mixer(x), full, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 3}, "num_heads=3"),
        ({"num_heads": 16}, "even width"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_heads": 2, "mini_batch_tokens": 0}, "mini_batch_tokens=0"),
        ({"num_heads": 2, "base_lr": 0.0}, "base_lr=0.0"),
        ({"num_heads": 2, "conv_width": 0}, "width=0"),
    ],
)
def test_impossible_settings_are_errors(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TTTLinear(d_model=16, **settings)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_interleaved_rotary_turns_neighbours(dtype: torch.dtype) -> None:
    """Also where a head's entries do not lie side by side in memory."""
    x = torch.randn(2, 3, 6, 5, dtype=dtype).transpose(2, 3)  # (B, T, H, K)
    y = rotary(x, torch.tensor([0, 1, 7]), theta=100.0, is_interleaved=True)
    angles = torch.tensor([0.0, 1.0, 7.0])[:, None] / 100.0 ** (torch.arange(0, 6, 2) / 6)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x[..., 0::2].double(), x[..., 1::2].double()
    expected = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)
    tolerance = 1e-6 if dtype == torch.float64 else 3e-2
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
