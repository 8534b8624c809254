"""LoRA beside Transformer²: what an adapter computes, and how many parameters it may have."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from archs.attention import Attention
from archs.decoder import Decoder
from archs.transformer_squared.lora import LowRankAdapters, place
from archs.transformer_squared.model import TransformerSquared

SIZES = {"vocab_size": 13, "d_model": 8, "num_layers": 2, "d_ff": 20}


def new_model(**settings: object) -> tuple[TransformerSquared, Decoder]:
    """The model, and a Decoder with the base's weights."""
    bases = []
    for _ in range(2):
        torch.manual_seed(0)
        mixers = [partial(Attention, num_heads=2, implementation="plain")]
        bases.append(Decoder(**SIZES, mixers=mixers).double())
    return TransformerSquared(base=bases[0], domains=("a", "b"), **settings).double(), bases[1]


@torch.no_grad()
@pytest.mark.parametrize("rank", [None, 1, 3])
def test_an_adapter_adds_its_product_to_its_matrices(rank: int | None) -> None:
    model, base = new_model(lora_rank=rank, lora_scale=0.5)
    tokens = torch.arange(34).view(2, 17) % 13
    with model.lora_attached("b"):
        torch.testing.assert_close(model(tokens), base(tokens), rtol=0, atol=1e-10)
    for b in model.lora.b:
        b.add_(torch.randn(b.shape, generator=torch.Generator().manual_seed(1)))
    linears = [
        linear
        for block in base.blocks
        for linear in (block.feed_forward.gate_proj, block.feed_forward.up_proj, block.feed_forward.down_proj)
    ]
    plain = base(tokens)
    for index, a, b in zip(model.lora.indices, model.lora.a, model.lora.b, strict=True):
        linears[index].weight.add_(0.5 * b[1] @ a[1])
    assert len(model.lora.indices) == (6 if rank else 1)
    with model.lora_attached("b"):
        torch.testing.assert_close(model(tokens), base(tokens), rtol=0, atol=1e-10)
        state = model.init_state(2, 17)
        logits, state = model.prefill(tokens[:, :16], state, num_logits=16)
        torch.testing.assert_close(logits, base(tokens)[:, :16], rtol=0, atol=1e-10)
        torch.testing.assert_close(model.decode(tokens[:, 16], state)[0], base(tokens)[:, 16])
    torch.testing.assert_close(model(tokens), plain, rtol=0, atol=1e-10)
    assert (base(tokens) - plain).abs().max() > 1e-3


def test_adapters_have_gradients_of_their_own() -> None:
    model, _ = new_model()
    model.lora.requires_grad_(True)
    with model.lora_attached("a"):
        model.loss(torch.arange(16).view(1, 16) % 13, torch.arange(1, 17).view(1, 16) % 13).backward()
    (b,) = model.lora.b
    assert b.grad[0].norm() > 0 and b.grad[1].norm() == 0


@pytest.mark.parametrize(
    ("num_layers", "width", "d_ff", "layers_by_kind"),
    [
        (2, 64, 256, {2: [1]}),  # 384 parameters: one matrix of 320
        (8, 320, 1120, {2: [0, 2, 4, 5, 7]}),  # 7,680 parameters: five of 1,440
        (4, 100, 110, {1: [2], 2: [0, 1, 2, 3]}),  # 1,200: every down of 210, and one up
    ],
)
def test_rank_one_goes_where_the_budget_reaches(
    num_layers: int, width: int, d_ff: int, layers_by_kind: dict[int, list[int]]
) -> None:
    """Kinds: 0 gate, 1 up, 2 down."""
    shapes = [(d_ff, width), (d_ff, width), (width, d_ff)] * num_layers
    budget, each = 3 * num_layers * min(width, d_ff), width + d_ff
    picked = place(shapes, budget)
    assert picked == sorted(3 * layer + kind for kind, layers in layers_by_kind.items() for layer in layers)
    assert len(picked) * each <= budget < (len(picked) + 1) * each
    adapters = LowRankAdapters(shapes=shapes, num_adapters=2, budget=budget)
    assert adapters.num_parameters_each == len(picked) * each
    assert sum(p.numel() for p in adapters.parameters()) == 2 * len(picked) * each


def test_one_matrix_at_least_is_adapted_and_the_excess_is_said() -> None:
    shapes = [(256, 64), (256, 64), (64, 256)]
    adapters = LowRankAdapters(shapes=shapes, num_adapters=2, budget=3 * 64)
    assert adapters.indices == [2] and adapters.num_parameters_each == 320
    assert "320 parameters a domain against an expert's 192 (+67%)" in adapters.description
    wide = LowRankAdapters(shapes=shapes, num_adapters=2, budget=3 * 64, rank=16)
    assert wide.num_parameters_each == 3 * 16 * 320 and "rank 16 on 3 of 3" in wide.description
