"""Titans with one component less: every variant of conf/arch/titans_ablation keeps the contract."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from archs.base import SequenceModel, state_bytes
from tests.conftest import compose_resolved, make_model

CONF = Path(__file__).resolve().parent.parent.parent.parent / "conf"
VARIANTS = sorted(path.stem for path in (CONF / "arch" / "titans_ablation").glob("*.yaml"))
#: What arXiv 2501.00663, table 5, takes away.
CHANGED = {
    "lmm_linear": {"memory_depth": 1},
    "lmm_no_convolution": {"conv_width": 0},
    "lmm_no_momentum": {"use_momentum": False},
    "lmm_no_decay": {"use_decay": False},
    "mac_no_persistent": {"num_persistent_tokens": 0},
}
NUM_TOKENS = 75  # ends in the middle of a chunk and of a segment


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> SequenceModel:
    return make_model(f"titans_ablation/{request.param}")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_differs_from_its_base_in_one_component(name: str) -> None:
    base = compose_resolved(f"arch=titans_{name.partition('_')[0]}")["arch"]
    arch = compose_resolved(f"arch=titans_ablation/{name}")["arch"]
    (mixer,), (base_mixer,) = arch["model"]["mixers"], base["model"]["mixers"]
    assert {key: value for key, value in mixer.items() if base_mixer[key] != value} == CHANGED[name]
    assert {**arch["model"], "mixers": []} == {**base["model"], "mixers": []}
    assert arch["name"] == f"titans_{name}" and arch["display_name"] != base["display_name"]
    assert arch["has_short_convolution"] == (mixer["conv_width"] > 1)
    assert arch["learning_rate"] == base["learning_rate"]


@torch.no_grad()
def test_chunks_and_steps_are_the_full_forward(variant: SequenceModel) -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, variant.vocab_size, (2, NUM_TOKENS), generator=generator)
    expected = variant(tokens)
    state, outputs = variant.init_state(2, NUM_TOKENS), []
    for first, last in ((0, 1), (1, 41), (41, 70)):
        y, state = variant.prefill(tokens[:, first:last], state, num_logits=last - first)
        outputs.append(y)
    for step in range(70, NUM_TOKENS):
        y, state = variant.decode(tokens[:, step], state)
        outputs.append(y[:, None])
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=0, atol=1e-9)
    assert state_bytes(state) == variant.state_bytes_at(2, NUM_TOKENS)
    changed = tokens.clone()
    changed[:, 50:] = (changed[:, 50:] + 1) % variant.vocab_size
    torch.testing.assert_close(variant(changed)[:, :50], expected[:, :50], rtol=0, atol=1e-9)


def test_gradients_reach_every_parameter_that_is_left(variant: SequenceModel) -> None:
    tokens = torch.randint(0, variant.vocab_size, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(2))
    variant.zero_grad()
    variant.loss(tokens, tokens.roll(-1, 1)).backward()
    gradients = {name: p.grad for name, p in variant.named_parameters() if p.numel()}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    assert sum(bool(g.abs().max() == 0) for g in gradients.values() if g is not None) == 0


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_a_memory_of_every_depth_of_the_paper(depth: int) -> None:
    """Section 5.5: one to four layers; the state holds three copies of them."""
    model = make_model("titans_lmm", f"arch.memory.depth={depth}", "size.num_layers=1")
    start = model.blocks[0].mixers[0].memory.start
    assert len(start) == depth
    tails = 3 * 32 * 4  # q, k and v of width 32, four inputs each
    expected = 3 * sum(w.numel() for w in start) + tails
    assert model.state_bytes_at(1, 10) == state_bytes(model.init_state(1, 10)) == 8 * expected


@torch.no_grad()
@pytest.mark.parametrize(("key", "gate"), [("use_decay", 0), ("use_momentum", 2)])
def test_a_gate_that_is_switched_off_moves_nothing(key: str, gate: int) -> None:
    tokens = torch.randint(0, 257, (1, 40), generator=torch.Generator().manual_seed(3))
    for is_on in (True, False):
        model = make_model("titans_lmm", f"arch.memory.{key}={str(is_on).lower()}")
        before = model(tokens)
        for block in model.blocks:
            memory = block.mixers[0].memory
            memory.gates.bias[gate * memory.num_heads : (gate + 1) * memory.num_heads] += 1.0
        assert torch.equal(model(tokens), before) != is_on
