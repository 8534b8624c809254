"""The training loop: resumed runs give the same numbers, every architecture sees the same tokens."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from archs.base import SequenceModel
from harness.config.build import build_model, instantiate, resolve
from harness.config.compose import compose_config
from harness.config.match import matched_model_config
from harness.config.schema import parse, parse_job
from harness.train import loop as training_module
from harness.train.checkpoint import load_model, save_model, save_training_state
from harness.train.errors import CheckpointError, Diverged
from harness.train.loop import Batch, History, add_gradients, make_optimizer, train
from harness.train.settings import Training

CORPUS = Path(__file__).resolve().parent.parent.parent / "corpus"
ARCHITECTURES = sorted(
    path.stem
    for path in (CORPUS.parent.parent / "conf" / "arch").glob("*.yaml")
    if "is_pretrained: true" not in path.read_text()
)
CPU = torch.device("cpu")


class Source:
    """Random tokens, a function of the step; counts what was asked for."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def _batch(self, seed: int) -> Batch:
        tokens = torch.randint(257, (2, 33), generator=torch.Generator().manual_seed(seed))
        return tokens[:, :-1], tokens[:, 1:], torch.ones(2, 32)

    def batch(self, step: int) -> Batch:
        self.steps.append(step)
        return self._batch(step)

    def validation_batches(self) -> Iterator[Batch]:
        yield self._batch(10_000)

    def mixture_batches(self) -> Iterator[Batch]:
        yield self._batch(20_000)


def new_model(arch: str) -> SequenceModel:
    config = parse_job(resolve(compose_config([f"arch={arch}", "size=nano", "match=none"])))
    torch.manual_seed(0)
    return build_model(matched_model_config(config)[0])


def settings(num_steps: int = 20, **changes: Any) -> Training:
    fields: dict[str, Any] = {"num_steps": num_steps, "learning_rate": 3e-3, "validation_interval_steps": 5}
    return parse(Training, fields | changes, "train")


class Cut(Exception):
    """The run is cut here."""


@pytest.mark.parametrize("arch", ["transformer_conv", "ttt_mlp", "recurrent"])
def test_a_resumed_run_ends_with_the_same_weights(arch: str, tmp_path: Path) -> None:
    whole, source = new_model(arch), Source()
    expected = train(whole, source, settings(), device=CPU, dtype=torch.float32)
    path = tmp_path / "run.training"

    def cut(step: int, loss: float) -> None:
        if step == 11:
            raise Cut

    with pytest.raises(Cut):
        often = settings(checkpoint_interval_s=0.0)
        train(new_model(arch), Source(), often, device=CPU, dtype=torch.float32, state_path=path, on_step=cut)
    resumed, source = new_model(arch), Source()
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.add_(1.0)  # all of it must come from the saved state
    history = train(resumed, source, settings(), device=CPU, dtype=torch.float32, state_path=path)
    assert source.steps == list(range(11, 20))
    assert history.losses_nats == expected.losses_nats and history.steps == list(range(20))
    assert history.validation_losses_nats == expected.validation_losses_nats
    assert history.validation_steps == [5, 10, 15, 20]
    assert history.trained_tokens == expected.trained_tokens == 20 * 64
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_training_learns_and_leaves_the_model_ready_to_use() -> None:
    model, source = new_model("transformer"), Source()
    history = train(model, source, settings(40), device=CPU, dtype=torch.float32)
    # On the same tokens each time: a training batch's own loss varies more than 40 steps change it.
    assert history.validation_losses_nats[-1] < history.validation_losses_nats[0] - 0.05
    assert not model.training and history.train_seconds > 0


@pytest.mark.parametrize(("micro_batch_tokens", "num_calls"), [(1, 5), (32, 3), (64, 2), (80, 1), (None, 1)])
def test_micro_batches_add_up_to_the_batch(micro_batch_tokens: int | None, num_calls: int) -> None:
    """5 rows of 16 tokens, with weights that differ from row to row and are all 0 in one."""
    model = new_model("transformer").double()
    tokens = torch.randint(0, model.vocab_size, (5, 16), generator=torch.Generator().manual_seed(1))
    weights = torch.arange(80.0).reshape(5, 16) ** 2
    weights[2] = 0.0
    model.loss(tokens, tokens.roll(-1, 1), weights).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    loss, calls = model.loss(tokens, tokens.roll(-1, 1), weights).item(), []
    model.zero_grad()
    inner = model.loss
    model.loss = lambda *batch: calls.append(batch[0].shape) or inner(*batch)  # type: ignore
    batch = (tokens, tokens.roll(-1, 1), weights)
    value = add_gradients(model, batch, micro_batch_tokens, device=CPU, dtype=torch.float32)
    assert value == pytest.approx(loss, rel=1e-12)
    assert len(calls) == num_calls - (micro_batch_tokens == 1)  # the row without a weight is left out
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12)


def test_training_in_micro_batches_takes_the_same_steps() -> None:
    losses = []
    for micro_batch_tokens in (None, 16):
        model = new_model("transformer")
        changed = settings(4, micro_batch_tokens=micro_batch_tokens)
        losses.append(train(model, Source(), changed, device=CPU, dtype=torch.float32).losses_nats)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_rate_ends_where_it_is_told_to() -> None:
    assert settings(100, final_learning_rate=1e-5).rate(99) == pytest.approx(1e-5)
    assert settings(100, final_ratio=0.5).rate(99) == pytest.approx(1.5e-3)
    assert settings(100, final_learning_rate=1e-5).rate(9) == settings(100).rate(9) == 3e-3
    with pytest.raises(ValueError, match="micro_batch_tokens=0 must be positive"):
        settings(micro_batch_tokens=0)


def test_the_last_step_always_validates() -> None:
    history = train(new_model("transformer"), Source(), settings(3), device=CPU, dtype=torch.float32)
    assert history.validation_steps == [3]


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run(spoilt: float) -> None:
    model = new_model("transformer")
    with torch.no_grad():
        next(model.parameters()).fill_(spoilt)
    with pytest.raises(Diverged, match="at step 10"):
        train(model, Source(), settings(), device=CPU, dtype=torch.float32)


def test_the_rate_warms_up_and_decays_to_its_share_of_the_peak() -> None:
    rates = [settings(100).rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(3e-4) and max(rates) == rates[9] == pytest.approx(3e-3)
    assert rates[-1] == pytest.approx(3e-4) and rates[10:] == sorted(rates[10:], reverse=True)


def test_matrices_alone_decay() -> None:
    model = new_model("transformer")
    decayed, others = make_optimizer(model, settings()).param_groups
    assert decayed["weight_decay"] == 0.1 and others["weight_decay"] == 0.0
    assert all(p.ndim >= 2 for p in decayed["params"]) and any(p.ndim < 2 for p in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_a_module_hears_how_far_the_warm_up_is() -> None:
    model = new_model("transformer")
    heard: list[float] = []

    class Listener(nn.Module):
        def set_training_progress(self, fraction: float) -> None:
            heard.append(fraction)

    model.add_module("listener", Listener())
    train(model, Source(), settings(4, warmup_fraction=0.5), device=CPU, dtype=torch.float32)
    assert heard == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_bfloat16_trains_under_autocast_with_float32_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model("transformer")
    history = train(model, Source(), settings(20), device=CPU, dtype=torch.bfloat16)
    assert history.validation_losses_nats[-1] < history.validation_losses_nats[0] - 0.05
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_steps", 0),
        ("num_steps", 2.0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", True),
        ("weight_decay", float("inf")),
        ("validation_interval_steps", 0),
        ("gradient_clip", 0.0),
        ("warmup_fraction", 1.1),
        ("warmup_fraction", -0.1),
        ("final_ratio", 1.5),
        ("weight_decay", -0.1),
        ("max_skipped_steps", -1),
        ("checkpoint_interval_s", -1.0),
        ("betas", (0.9, 1.0)),
        ("gradient_clip", float("nan")),
    ],
)
def test_settings_out_of_their_range(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"train\.{name}=.* must"):
        settings(**{name: value})
    settings(warmup_fraction=0, final_ratio=1, weight_decay=0, max_skipped_steps=0, betas=(0.0, 0.0))


@pytest.fixture(scope="module")
def stream_hashes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of each architecture's stream, as its own configuration builds it: a hash of the batches."""
    corpus, hashes = None, {}
    cache = tmp_path_factory.mktemp("cache")
    for arch in ARCHITECTURES:
        overrides = [f"arch={arch}", "size=nano", "data=text_folder", f"data.path={CORPUS}"]
        config = resolve(compose_config([*overrides, f"data.cache_dir={cache}", "train.num_steps=9"]))
        corpus = corpus or instantiate(config["data"]["corpus"])
        stream = instantiate({**config["train"]["stream"], "_partial_": True})(corpus=corpus)
        digest = hashlib.sha256()
        for step in (0, 4, 8):
            for tensor in stream.batch(step):
                digest.update(tensor.numpy().tobytes())
        hashes[arch] = digest.hexdigest()
    return hashes


def test_every_architecture_sees_the_same_tokens_in_the_same_order(stream_hashes: dict[str, str]) -> None:
    assert len(set(stream_hashes.values())) == 1 and len(stream_hashes) >= 13


def test_a_model_is_loaded_strictly(tmp_path: Path) -> None:
    model, path = new_model("transformer"), tmp_path / "model.safetensors"
    save_model(path, model, {"metrics": {"a": 1}})
    other = new_model("transformer")
    with torch.no_grad():
        next(other.parameters()).zero_()
    assert load_model(path, other) == {"metrics": {"a": 1}}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_model(path, new_model("transformer_conv"))
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "no partial file is left"


@pytest.mark.parametrize("damage", [b"", b"\xff" * 100, None])
def test_a_damaged_file_says_what_to_do(damage: bytes | None, tmp_path: Path) -> None:
    model, path = new_model("transformer"), tmp_path / "model.safetensors"
    save_model(path, model, {})
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged .*; delete it"):
        load_model(path, model)


def test_a_damaged_training_state_says_what_to_do(tmp_path: Path) -> None:
    model, path = new_model("transformer"), tmp_path / "run.training"
    save_training_state(path, model, make_optimizer(model, settings()), 3, History())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="delete it and run the same command again"):
        train(model, Source(), settings(), device=CPU, dtype=torch.float32, state_path=path)


def test_a_checkpoint_of_another_kind_is_not_taken_for_a_training_state(tmp_path: Path) -> None:
    model, path = new_model("transformer"), tmp_path / "run.training"
    save_model(path, model, {})
    with pytest.raises(CheckpointError):
        train(model, Source(), settings(), device=CPU, dtype=torch.float32, state_path=path)


def test_history_is_plain_data() -> None:
    assert History(**dataclasses.asdict(History(steps=[1]))) == History(steps=[1])
    assert training_module.autocast(CPU, torch.float32).__class__.__name__ == "nullcontext"
