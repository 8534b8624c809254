"""What every architecture in conf/arch keeps. Adding one needs no edit here."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from archs.base import Flops, SequenceModel, clone_state, state_bytes, state_tensors

BATCH = 2
NUM_TOKENS = 97  # crosses mini-batches, chunks, segments and windows of the nano sizes, and is odd
TOLERANCE = 1e-9


def tokens_for(model: SequenceModel, num_tokens: int = NUM_TOKENS, batch: int = BATCH) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.vocab_size, (batch, num_tokens), generator=generator)


@pytest.fixture(scope="module")
def full(model: SequenceModel) -> Tensor:
    with torch.no_grad():
        return model(tokens_for(model))


@torch.no_grad()
def run_chunks(model: SequenceModel, tokens: Tensor, sizes: list[int]) -> Tensor:
    """Logits of all positions, prefilled in chunks of `sizes`, then decoded to the end."""
    state = model.init_state(tokens.shape[0], tokens.shape[1])
    logits, position = [], 0
    for size in sizes:
        chunk = tokens[:, position : position + size]
        output, state = model.prefill(chunk, state, num_logits=size)
        logits.append(output)
        position += size
    for step in range(position, tokens.shape[1]):
        output, state = model.decode(tokens[:, step], state)
        logits.append(output[:, None])
    assert state.num_tokens == tokens.shape[1]
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(
    "sizes",
    [[NUM_TOKENS], [1, 63, 32], [64, 33], [65, 31], [7, 16, 1, 17, 40, 3], [33], [16, 48], []],
    ids=lambda sizes: "-".join(map(str, sizes)) or "steps",
)
def test_any_chunking_gives_the_full_forward(model: SequenceModel, full: Tensor, sizes: list[int]) -> None:
    torch.testing.assert_close(run_chunks(model, tokens_for(model), sizes), full, rtol=0, atol=TOLERANCE)


def test_what_is_written_for_many_numbers_gives_the_same(
    model: SequenceModel, full: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forms that archs.layers takes where an input is large."""
    monkeypatch.setattr("archs.ops.elementwise.MANY_NUMBERS", 1)
    tokens = tokens_for(model)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), full, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(run_chunks(model, tokens, [64, 16]), full, rtol=0, atol=TOLERANCE)


def test_half_precision_under_autocast_keeps_to_the_contract(model: SequenceModel) -> None:
    """As training and evaluation on a GPU run it: weights and state in float32, products in bfloat16."""
    if any(isinstance(module, torch.nn.LSTM) for module in model.modules()):
        pytest.skip("on a CPU torch's LSTM has no bfloat16 products on float32 weights")
    single, tokens = copy.deepcopy(model).float(), tokens_for(model, 40)
    with torch.no_grad():
        exact = single(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        single.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        with torch.no_grad():
            whole, steps = single(tokens), run_chunks(single, tokens, [18, 19])
            state = single.prefill(tokens[:, :-1], single.init_state(BATCH, 40))[1]
            last = single.decode_at(tokens[:, -1], state, torch.tensor([39]))[0]
    assert all(p.grad is None or p.grad.isfinite().all() for p in single.parameters())
    for output, expected in ((whole, exact), (steps, exact), (last, steps[:, -1])):
        assert (output.float() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16, 17, 63, 64, 65])
def test_a_prefix_gives_the_prefix_of_the_outputs(
    model: SequenceModel, full: Tensor, num_tokens: int
) -> None:
    with torch.no_grad():
        output = model(tokens_for(model)[:, :num_tokens])
    torch.testing.assert_close(output, full[:, :num_tokens], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("position", [1, 16, 40, 70, NUM_TOKENS - 1])
def test_no_future_token_changes_a_past_output(model: SequenceModel, full: Tensor, position: int) -> None:
    changed = tokens_for(model).clone()
    changed[:, position:] = (changed[:, position:] + 1) % model.vocab_size
    with torch.no_grad():
        output = model(changed)
    torch.testing.assert_close(output[:, :position], full[:, :position], rtol=0, atol=TOLERANCE)
    assert not torch.allclose(output[:, position:], full[:, position:], rtol=0, atol=1e-6)


def test_rows_do_not_touch_each_other(model: SequenceModel, full: Tensor) -> None:
    changed = tokens_for(model).clone()
    changed[1] = (changed[1] + 1) % model.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(model(changed)[0], full[0], rtol=0, atol=TOLERANCE)
    stepped = run_chunks(model, changed, [50])
    torch.testing.assert_close(stepped[0], full[0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("batch", "num_tokens"), [(1, 1), (2, 97), (3, 40)])
def test_state_bytes_are_predicted_and_stay(model: SequenceModel, batch: int, num_tokens: int) -> None:
    tokens = tokens_for(model, num_tokens, batch)
    state = model.init_state(batch, num_tokens)
    predicted = model.state_bytes_at(batch, num_tokens)
    assert state_bytes(state) == predicted
    with torch.no_grad():
        _, state = model.prefill(tokens, state)
    assert state_bytes(state) == predicted
    assert all(t.shape[0] == batch for t in state_tensors(state)), "batch axis first"


def test_state_bytes_are_predicted_in_half_precision(model: SequenceModel) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert state_bytes(half.init_state(2, 33)) == half.state_bytes_at(2, 33)


def test_a_clone_branches(model: SequenceModel, full: Tensor) -> None:
    tokens = tokens_for(model)
    with torch.no_grad():
        _, state = model.prefill(tokens[:, :50], model.init_state(BATCH, NUM_TOKENS))
        branch = clone_state(state)
        model.prefill(tokens[:, 50:], state)
        logits, _ = model.prefill(tokens[:, 50:], branch, num_logits=NUM_TOKENS - 50)
    torch.testing.assert_close(logits, full[:, 50:], rtol=0, atol=TOLERANCE)


def test_num_logits_counts_from_the_end(model: SequenceModel, full: Tensor) -> None:
    tokens = tokens_for(model)
    with torch.no_grad():
        logits, _ = model.prefill(tokens, model.init_state(BATCH, NUM_TOKENS), num_logits=3)
    torch.testing.assert_close(logits, full[:, -3:], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("num_logits", [-1, NUM_TOKENS + 1])
def test_a_wrong_num_logits_is_an_error(model: SequenceModel, num_logits: int) -> None:
    with pytest.raises(ValueError, match="num_logits"):
        model.prefill(tokens_for(model), model.init_state(BATCH, NUM_TOKENS), num_logits=num_logits)


@pytest.mark.parametrize(("batch", "num_tokens"), [(0, 8), (-1, 8), (2, 0), (2, -5)])
def test_a_state_of_no_size_is_an_error(model: SequenceModel, batch: int, num_tokens: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        model.init_state(batch, num_tokens)


def test_loss_is_the_mean_cross_entropy_of_forward(model: SequenceModel, full: Tensor) -> None:
    tokens = tokens_for(model)
    targets = tokens.roll(-1, dims=1)
    nll = torch.nn.functional.cross_entropy(full.flatten(0, 1), targets.flatten(), reduction="none")
    weights = torch.arange(tokens.numel(), dtype=full.dtype).reshape(tokens.shape)
    with torch.no_grad():
        torch.testing.assert_close(model.loss(tokens, targets), nll.mean())
        expected = (nll * weights.flatten()).sum() / weights.sum()
        torch.testing.assert_close(model.loss(tokens, targets, weights), expected)


def test_gradients_are_finite_and_match_finite_differences(model: SequenceModel) -> None:
    model = copy.deepcopy(model)
    tokens = tokens_for(model, 41)
    targets = tokens.roll(-1, dims=1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(model.loss(tokens, targets), parameters, allow_unused=True)
    generator = torch.Generator().manual_seed(2)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    slope = 0.0
    for gradient, direction in zip(gradients, directions, strict=True):
        if gradient is not None:
            assert torch.isfinite(gradient).all()
            slope += (gradient * direction).sum().item()
    assert sum(g is not None for g in gradients) >= 0.9 * len(gradients)

    def loss_at(step: float) -> float:
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=step)
            value = model.loss(tokens, targets).item()
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.sub_(direction, alpha=step)
        return value

    step = 1e-6
    assert slope == pytest.approx((loss_at(step) - loss_at(-step)) / (2 * step), rel=1e-4, abs=1e-7)


def test_save_and_load_give_the_same_numbers(model: SequenceModel, full: Tensor) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
        assert not torch.allclose(other(tokens_for(model)), full)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(tokens_for(model)), full)


def test_prefill_flops_grow_with_context_and_decode_is_one_step(model: SequenceModel) -> None:
    prefill = [model.flops(num_tokens, "prefill").total for num_tokens in (64, 128, 256)]
    assert 0 < prefill[0] < prefill[1] < prefill[2]
    assert 0 < model.flops(256, "decode").total < prefill[2] / 50


#: Beside size=nano; a checkpoint keeps its own shape.
OTHER_SHAPE = ("size.d_model=48", "size.num_layers=3", "size.num_heads=3", "size.d_ff=80")


@torch.no_grad()
@pytest.mark.parametrize(
    ("shape", "num_tokens"),
    # 256: whole mini-batches, chunks and segments. 63 and 17 end in the middle of them.
    [((), 256), (OTHER_SHAPE, 63), (("size.num_kv_heads=2", "size.num_layers=3"), 17)],
    ids=["256", "other-63", "other-17"],
)
def test_matrix_flops_hold_against_a_counter(
    arch: str, new_model: Callable[..., SequenceModel], shape: tuple[str, ...], num_tokens: int
) -> None:
    """Within 2%, in prefill and in the step after it. The counter sees an LSTM's products in float64 only:
    in float32 it is one kernel."""
    plain = ("implementation.attention=plain", "implementation.segment_attention=plain")
    model = new_model(arch, *plain, *shape, dtype=torch.float32)
    if any(isinstance(module, torch.nn.LSTM) for module in model.modules()):
        model.double()
    tokens = tokens_for(model, num_tokens + 1, 1)
    state = model.init_state(1, num_tokens + 1)
    assert state_bytes(state) == model.state_bytes_at(1, num_tokens + 1)
    with FlopCounterMode(display=False) as counter:
        _, state = model.prefill(tokens[:, :-1], state)
    assert counter.get_total_flops() == pytest.approx(_seen(model.flops(num_tokens, "prefill")), rel=0.02)
    with FlopCounterMode(display=False) as counter:
        model.decode(tokens[:, -1], state)
    assert counter.get_total_flops() == pytest.approx(_seen(model.flops(num_tokens + 1, "decode")), rel=0.02)


def _seen(flops: Flops) -> float:
    """What a counter sees of them: attention as the full square, no scan."""
    return flops.matmul + flops.attention_square
