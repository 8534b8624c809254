"""The typed configuration: it is what was composed, no more and no less, and a mistake is one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from harness.config.compose import compose_config, resolve
from harness.config.schema import TrainConfig, parse, parse_job
from harness.record.schema import content_hash
from tests.conftest import compose_job, compose_resolved

CONF = Path(__file__).resolve().parent.parent.parent.parent / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


@pytest.mark.parametrize(
    "override", ["arch=transformer_squared", "arch=mamba", *(f"experiment={name}" for name in EXPERIMENTS)]
)
def test_records_hold_the_very_values_that_were_composed(override: str) -> None:
    """A float of a record that became an int, or a default that was added, would change its hash."""
    values = compose_resolved(override)
    assert parse_job(values).to_plain() == values
    assert content_hash(parse_job(values).to_plain()) == content_hash(values)


def test_a_changed_setting_is_among_the_plain_values() -> None:
    config = compose_job().model_copy(update={"num_workers": 7})
    assert config.to_plain() == {**compose_resolved(), "num_workers": 7}


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        compose_job().seed = 1  # type: ignore[misc]


def test_a_job_has_an_architecture() -> None:
    values = resolve(compose_config(["arch=[]", "seed=3"]))
    with pytest.raises(ValueError, match=r"^The configuration lacks arch\.$"):
        parse_job(values)


def test_all_missing_keys_are_named_at_once() -> None:
    values = compose_resolved()
    del values["size"]["d_ff"], values["size"]["name"]
    with pytest.raises(ValueError, match=r"^size lacks name, d_ff\.$"):
        parse_job(values)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"search_grid": [1e-3, float("inf")]}, "each item a finite number."),
        ({"weight_decay": "0.1"}, "train.weight_decay='0.1' must be a number."),
        ({"search": 1}, "train.search=1 must be true or false."),
        ({"num_steps": True}, "train.num_steps=True must be a whole number."),
        ({"micro_batch_tokens": 1.5}, "train.micro_batch_tokens=1.5 must be a whole number or null."),
        ({"final_ratio": -0.1}, "train.final_ratio=-0.1 must not be negative."),
        ({"gradient_clipp": 1}, "Unknown key of train: 'gradient_clipp'. Did you mean 'gradient_clip'?"),
    ],
)
def test_a_mistake_names_key_and_value_and_what_is_valid(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(TrainConfig, compose_resolved()["train"] | changes, "train")
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_an_architecture_and_a_data_set_may_have_keys_of_their_own() -> None:
    config = compose_job("+arch.note=mine", "+data.year=1919")
    assert config.to_plain()["arch"]["note"] == "mine" and config.to_plain()["data"]["year"] == 1919


def test_the_recipes_rate_stands_in_place_of_the_architectures() -> None:
    assert compose_job().learning_rates == [2.5e-3]
    assert compose_job("+train.peak_learning_rate=0.1").learning_rates == [0.1]
    assert compose_job("train.search=true").learning_rates == [2.5e-3, 5e-3]
    with pytest.raises(ValueError, match=r"final_learning_rate=0.01 must lie between 0 and the peak, 0.0025"):
        compose_job("+train.final_learning_rate=0.01")
