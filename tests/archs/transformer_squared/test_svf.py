"""Transformer² around bases of other kinds, a published checkpoint's among them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from archs.attention import Attention
from archs.decoder import Decoder
from archs.layers import ShortConvolution
from archs.mamba import Mamba
from archs.pretrained.load import load_pretrained
from archs.transformer_squared.model import TransformerSquared
from archs.transformer_squared.svf import compose, keep_sum

# llama_svf: a vector p for every feed-forward matrix of `llama`, and the logits of its published
# implementation with each matrix composed by Transformer²'s public code: S times sigmoid(p) max_mult, the
# whole scaled by sum(S) / sum(S sigmoid(p) max_mult).
GOLDENS = Path(__file__).resolve().parent.parent.parent / "goldens"
TOLERANCE = 2e-4
ATTENTION = partial(Attention, num_heads=2, implementation="plain")


def golden_model() -> tuple[TransformerSquared, dict[str, Tensor]]:
    """The expert "golden" holds the vectors of the file; and the file's expected tokens and logits."""
    path = GOLDENS / "llama_svf" / "z.safetensors"
    with safe_open(path, "pt") as file:
        max_multiplier = float(file.metadata()["max_mult"])
    vectors, base = load_file(path), load_pretrained(GOLDENS / "llama")
    model = TransformerSquared(
        base=base, domains=["other", "golden"], scale="public_code", max_multiplier=max_multiplier
    )
    names = [f"model.layers.{i}.mlp.{k}_proj.weight" for i in range(2) for k in ("gate", "up", "down")]
    assert set(names) == set(vectors)
    with torch.no_grad():
        model.experts[1] = torch.cat([vectors[name] for name in names])
    return model.eval(), load_file(GOLDENS / "llama_svf" / "expected.safetensors")


@torch.no_grad()
def test_a_loaded_model_with_an_expert_agrees_with_the_public_code() -> None:
    model, expected = golden_model()
    tokens, logits = expected["tokens"], expected["logits"]
    full = model(tokens, model.domain_mixture("golden", 2))
    torch.testing.assert_close(full, logits, rtol=0, atol=TOLERANCE)
    state = model.select_domain("golden", model.init_state(2, tokens.shape[1]))
    stepped, state = model.prefill(tokens[:, :41], state, num_logits=41)
    parts = [stepped]
    for position in range(41, tokens.shape[1]):
        step, state = model.decode(tokens[:, position], state)
        parts.append(step[:, None])
    torch.testing.assert_close(torch.cat(parts, dim=1), logits, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_a_loaded_model_without_an_expert_is_the_loaded_model() -> None:
    model, expected = golden_model()
    plain = load_file(GOLDENS / "llama" / "expected.safetensors")["logits"]
    torch.testing.assert_close(model(expected["tokens"]), plain, rtol=0, atol=TOLERANCE)
    assert (expected["logits"] - plain).abs().max() > 100 * TOLERANCE, "the expert has a say"


@torch.no_grad()
def test_the_composed_matrices_are_those_of_the_published_sum() -> None:
    """In float64: z from p, and the matrix the golden was computed with."""
    model, _ = golden_model()
    weight = load_pretrained(GOLDENS / "llama").blocks[1].feed_forward.down_proj.weight.double()
    p = load_file(GOLDENS / "llama_svf" / "z.safetensors")["model.layers.1.mlp.down_proj.weight"].double()
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    expected = (u * (s * p.sigmoid())) @ vh * (s.sum() / (s * p.sigmoid()).sum())
    matrix = model.double().feed_forwards[1].down_proj
    actual = compose(matrix.u, matrix.s, matrix.vh, keep_sum(p.sigmoid(), matrix.s))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_feed_forward_with_biases_keeps_them() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "d_model": 8, "num_layers": 2, "d_ff": 20, "mixers": [ATTENTION]}
    bases = [Decoder(**sizes, use_feed_forward_bias=True).double() for _ in range(2)]
    tokens = torch.arange(22).view(2, 11) % 11
    logits = [base(tokens) for base in bases]
    weights = bases[1].state_dict()
    num_parameters = bases[0].num_parameters
    model = TransformerSquared(base=bases[0], domains=["a"]).double()
    torch.testing.assert_close(model(tokens), logits[0], rtol=0, atol=1e-10)
    learned = model.experts.numel() + sum(p.numel() for p in model.classifier.parameters())
    assert model.num_parameters == num_parameters + learned
    model.load_base(weights)
    torch.testing.assert_close(model(tokens), logits[1], rtol=0, atol=1e-10)
    del weights["blocks.1.feed_forward.down_proj.bias"]
    with pytest.raises(ValueError, match=r"lack blocks\.1\.feed_forward\.down_proj\.bias"):
        model.load_base(weights)


@torch.no_grad()
def test_mixers_of_any_kind_and_a_layer_before_them_may_be_in_the_base() -> None:
    torch.manual_seed(0)
    mixers = [partial(Mamba, state_width=4), ATTENTION]
    base = Decoder(
        vocab_size=11,
        d_model=8,
        num_layers=2,
        d_ff=20,
        mixers=mixers,
        pre_mixer=partial(ShortConvolution, width=4),
    ).double()
    tokens = torch.arange(22).view(2, 11) % 11
    logits = base(tokens)
    model = TransformerSquared(base=base, domains=["a"])
    torch.testing.assert_close(model(tokens), logits, rtol=0, atol=1e-10)
    assert {p.dtype for p in model.parameters()} == {torch.float64}, "the base's"
    state = model.dispatch(tokens, model.init_state(2, 11))
    torch.testing.assert_close(model.prefill(tokens, state, num_logits=11)[0], logits, rtol=0, atol=1e-10)


def test_a_base_without_a_feed_forward_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"no feed-forward matrices.*arch@reference"):
        TransformerSquared(base=load_pretrained(GOLDENS / "mamba"), domains=["a"])
