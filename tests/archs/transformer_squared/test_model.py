"""Singular-value experts, their mixtures and the first pass."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from archs.attention import Attention
from archs.base import state_bytes
from archs.decoder import Decoder
from archs.transformer_squared.model import TransformerSquared
from archs.transformer_squared.svf import SingularLinear, compose, keep_sum

SIZES = {
    "vocab_size": 13,
    "d_model": 8,
    "num_layers": 2,
    "d_ff": 20,
    "mixers": [partial(Attention, num_heads=2, implementation="plain")],
}
DOMAINS = ("code", "needle", "prose")


def new_base() -> Decoder:
    torch.manual_seed(0)
    return Decoder(**SIZES).double()


def new_model(base: Decoder | None = None, **settings: object) -> TransformerSquared:
    torch.manual_seed(1)
    model = TransformerSquared(base=Decoder(**SIZES), domains=DOMAINS, **settings).double()
    model.load_base((base or new_base()).state_dict())
    return model


def with_experts(model: TransformerSquared) -> TransformerSquared:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in (model.experts, model.classifier.weight, model.classifier.bias):
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    linear.weight.data = weight
    if bias is not None:
        linear.bias.data = bias
    return linear


def random_tokens(batch: int = 3, length: int = 17, seed: int = 3) -> Tensor:
    return torch.randint(0, 13, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(20, 8), (8, 20), (8, 8)])
def test_the_factored_product_is_the_composed_matrix(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    linear = SingularLinear(linear=linear_of(weight))
    gain = torch.rand(3, min(shape), dtype=torch.float64)
    x = torch.randn(3, 5, shape[1], dtype=torch.float64)
    composed = compose(linear.u, linear.s, linear.vh, gain)
    assert_close(linear(x, gain), torch.einsum("bmn,bcn->bcm", composed, x))
    assert_close(linear(x[:, 0], gain), torch.einsum("bmn,bn->bm", composed, x[:, 0]))
    assert_close(compose(linear.u, linear.s, linear.vh, torch.ones_like(linear.s)), weight)


def test_the_public_scale_keeps_the_sum_of_the_singular_values() -> None:
    s, z = torch.rand(6, dtype=torch.float64), torch.rand(4, 6, dtype=torch.float64)
    gain = keep_sum(z, s)
    assert_close((gain * s).sum(dim=-1), s.sum().expand(4))
    assert_close(gain / gain[:, :1], z / z[:, :1])


@torch.no_grad()
@pytest.mark.parametrize("scale", ["paper", "public_code"])
def test_without_an_expert_and_with_untrained_ones_it_is_the_base(scale: str) -> None:
    base, tokens = new_base(), random_tokens()
    model = new_model(base, scale=scale)
    assert_close(model(tokens), base(tokens))
    assert_close(model(tokens, model.domain_mixture("needle", 3)), base(tokens))
    assert_close(with_experts(model)(tokens), base(tokens))
    assert (model(tokens, model.domain_mixture("needle", 3)) - base(tokens)).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("scale", ["paper", "public_code"])
def test_a_mixture_scales_the_singular_values_of_the_base(scale: str) -> None:
    """A Decoder given the composed matrices computes the same."""
    model, mixture = with_experts(new_model(scale=scale)), torch.tensor([[0.5, 0.2, 0.1]]).double()
    z = 1 + sum(a * (model.experts[e] - 1) for e, a in enumerate(mixture[0]))
    if scale == "public_code":
        z = 1 + sum(a * (model.experts[e].sigmoid() - 1) for e, a in enumerate(mixture[0]))
    base, start = new_base(), 0
    for block in base.blocks:
        feed_forward = block.feed_forward
        for linear in (feed_forward.gate_proj, feed_forward.up_proj, feed_forward.down_proj):
            u, s, vh = torch.linalg.svd(linear.weight, full_matrices=False)
            own = z[start : start + len(s)]
            rescale = s.sum() / (s * own).sum() if scale == "public_code" else 1.0
            linear.weight.copy_(u @ torch.diag(s * own * rescale) @ vh)
            start += len(s)
    assert_close(model(random_tokens(1), mixture), base(random_tokens(1)))


@torch.no_grad()
def test_rows_run_under_their_own_mixtures() -> None:
    model, tokens = with_experts(new_model()), random_tokens(4)
    mixture = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 0, 1], [0.3, 0.3, 0.4]]).double()
    together = model(tokens, mixture)
    state = model.init_state(4, 17)._replace(mixture=mixture)
    logits, state = model.prefill(tokens[:, :9], state, num_logits=9)
    stepped = [logits]
    for position in range(9, 17):
        logits, state = model.decode(tokens[:, position], state)
        stepped.append(logits[:, None])
    assert_close(torch.cat(stepped, dim=1), together)
    for row in range(4):
        assert_close(model(tokens[row : row + 1], mixture[row : row + 1]), together[row : row + 1])
    changed = mixture.clone()
    changed[1] = torch.tensor([0.0, 1.0, 0.0])
    assert_close(model(tokens, changed)[[0, 2, 3]], together[[0, 2, 3]])
    assert (model(tokens, changed)[1] - together[1]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("rule", ["pick", "mix"])
def test_dispatch_reads_the_whole_prompt(rule: str) -> None:
    model, prompt = with_experts(new_model(dispatch_rule="mix")), random_tokens()
    mixture = model.dispatch(prompt, model.init_state(3, 20)).mixture
    assert_close(mixture.sum(dim=1), torch.ones(3).double())
    for position in (0, 8, 16):
        changed = prompt.clone()
        changed[:, position] = (changed[:, position] + 1) % 13
        other = model.dispatch(changed, model.init_state(3, 20)).mixture
        assert ((other - mixture).abs().amax(dim=1) > 1e-6).all(), position
    picking = with_experts(new_model(dispatch_rule="pick"))
    picked = picking.dispatch(prompt, picking.init_state(3, 20)).mixture
    assert picked.tolist() == torch.eye(3)[mixture.argmax(dim=1)].tolist()


@torch.no_grad()
def test_dispatch_treats_rows_apart_and_leaves_the_context_empty() -> None:
    model, prompt = with_experts(new_model(dispatch_rule="mix")), random_tokens()
    state = model.dispatch(prompt, model.init_state(3, 20))
    alone = model.dispatch(prompt[1:2], model.init_state(1, 20))
    assert_close(state.mixture[1:2], alone.mixture)
    assert state.num_tokens == state.decoder.num_tokens == 0
    logits, after = model.prefill(prompt, state, num_logits=17)
    assert_close(logits, model(prompt, state.mixture))
    assert state_bytes(after) == model.state_bytes_at(3, 20)


@torch.no_grad()
def test_a_domain_selects_its_expert_and_an_unknown_one_the_base() -> None:
    model, tokens = with_experts(new_model()), random_tokens()
    state = model.select_domain("prose", model.init_state(3, 17))
    assert state.mixture.tolist() == [[0, 0, 1]] * 3
    assert_close(model.prefill(tokens, state, num_logits=17)[0], model(tokens, state.mixture))
    state = model.select_domain("prose", model.init_state(3, 17))
    assert model.select_domain("poetry", state).mixture.tolist() == [[0, 0, 0]] * 3


def test_the_mixture_cannot_change_after_the_first_token() -> None:
    model = new_model()
    with torch.no_grad():
        _, state = model.prefill(random_tokens(), model.init_state(3, 20))
    with pytest.raises(ValueError, match="has read 17"):
        model.dispatch(random_tokens(), state)
    with pytest.raises(ValueError, match="has read 17"):
        model.select_domain("code", state)


def test_a_prompt_of_another_batch_is_an_error() -> None:
    model = new_model()
    with pytest.raises(ValueError, match="2 rows and the state 3"):
        model.dispatch(random_tokens(2), model.init_state(3, 20))


def test_only_the_expert_in_use_gets_a_gradient() -> None:
    model, tokens = with_experts(new_model()), random_tokens()
    mixture = model.domain_mixture("needle", 3)
    model.loss(tokens, tokens.roll(-1, 1), mixture=mixture).backward()
    norms = model.experts.grad.norm(dim=1)
    assert norms[1] > 0 and norms[0] == norms[2] == 0
    assert all(p.grad is None for p in model.base.parameters())
    direction = torch.zeros_like(model.experts)
    direction[1] = torch.randn(direction.shape[1], dtype=torch.float64)
    values = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            model.experts.add_(direction, alpha=step)
            values.append(model.loss(tokens, tokens.roll(-1, 1), mixture=mixture).item())
    slope = (model.experts.grad * direction).sum().item()
    assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-8)


@torch.no_grad()
def test_answer_logits_predict_the_answers() -> None:
    model, prompts, answers = with_experts(new_model()), random_tokens(), random_tokens(length=4, seed=9)
    mixture = model.domain_mixture("code", 3)
    full = model(torch.cat((prompts, answers), dim=1), mixture)
    assert_close(model.answer_logits(prompts, answers, mixture), full[:, 16:20])


def test_parameters_are_the_base_the_experts_and_the_classifier() -> None:
    base, model = new_base(), new_model()
    experts, classifier = 3 * (2 * 3 * 8), 3 * (2 * 8) + 3
    assert model.num_parameters == sum(p.numel() for p in base.parameters()) + experts + classifier
    assert not any(name.endswith("feed_forward.up_proj.weight") for name in model.state_dict())


def test_the_first_pass_costs_what_a_counter_sees() -> None:
    model = new_model()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.dispatch(random_tokens(1), model.init_state(1, 20))
    flops = model.dispatch_flops(17)
    assert counter.get_total_flops() == flops.matmul + flops.attention_square


def test_loading_a_base_forgets_experts_of_another() -> None:
    base, tokens = new_base(), random_tokens()
    model = with_experts(new_model())
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1.5)
        model.load_base(base.state_dict())
        assert_close(model(tokens, model.domain_mixture("code", 3)), base(tokens), 1e-9)


def test_weights_of_another_shape_are_an_error() -> None:
    model, weights = new_model(), new_base().state_dict()
    lacking = {key: value for key, value in weights.items() if "up_proj" not in key}
    with pytest.raises(ValueError, match=r"lack blocks\.0\.feed_forward\.up_proj\.weight"):
        model.load_base(lacking)
    with pytest.raises(ValueError, match=r"\(21, 8\) instead of \(20, 8\)"):
        model.load_base({**weights, "blocks.0.feed_forward.up_proj.weight": torch.zeros(21, 8)})
    with pytest.raises(ValueError, match=r"do not fit.*surplus"):
        model.load_base({**weights, "surplus": torch.zeros(1)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"domains": []}, "domains="),
        ({"domains": ["code", "code"]}, "domains="),
        ({"scale": "log"}, "scale='log' must be one of paper, public_code"),
        ({"dispatch_rule": "best"}, "dispatch_rule='best' must be one of pick, mix"),
        ({"dispatch_strategy": "guess"}, "dispatch_strategy='guess' must be one of classifier, prompt"),
        ({"dispatch_strategy": "prompt"}, "'prompt' needs a classification_prompt"),
        ({"dispatch_strategy": "few_shot"}, "needs a few_shot_target"),
        ({"few_shot_target": "poetry"}, "few_shot_target='poetry' must be one of code, needle, prose"),
        ({"classification_prompt": ([1], [2, 3])}, "labels .2, 3."),
        ({"lora_rank": 0}, "lora_rank=0 must be positive"),
        ({"base": Decoder(**{**SIZES, "d_ff": 0})}, "no feed-forward matrices .d_ff=0."),
        ({"base": nn.Linear(1, 1)}, "must be a Decoder, not a Linear"),
    ],
)
def test_wrong_settings_are_errors(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerSquared(**{"base": Decoder(**SIZES), "domains": DOMAINS, **settings})


def test_an_expert_for_any_text_stands_in_for_domains_without_one() -> None:
    model = TransformerSquared(base=Decoder(**SIZES), domains=("any", "needle"))
    assert model.domain_mixture("prose", 2).tolist() == [[1.0, 0.0]] * 2
    assert model.domain_mixture("needle", 1).tolist() == [[0.0, 1.0]]
