"""The papers' recipes, conf/train: they compose at their sizes, say what the papers say, and train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.config.build import checked_job
from harness.config.compose import compose_config, resolve
from harness.config.schema import JobConfig
from harness.train.settings import training_settings

CONF = Path(__file__).resolve().parent.parent.parent.parent / "conf"
RECIPES = sorted(path.stem for path in (CONF / "train").glob("*.yaml") if path.stem != "default")


def compose(*overrides: str) -> JobConfig:
    return checked_job(resolve(compose_config(list(overrides))))


@pytest.mark.parametrize(
    ("recipe", "size", "num_steps", "rate", "final", "warmup_tokens"),
    [  # arXiv 2407.04620, table 3 and appendix C
        ("ttt", "125m", 4800, 3e-3, 1e-5, 0.25e9),
        ("ttt", "350m", 13500, 1.5e-3, 1e-5, 0.7e9),
        ("ttt", "760m", 29000, 1.25e-3, 1e-5, 1.5e9),
        ("ttt", "1.3b", 50000, 1e-3, 1e-5, 2.6e9),
        ("mamba", "130m", 4800, 3e-3, 1e-5, 0.25e9),  # arXiv 2312.00752, table 12, five times its rate
        ("mamba", "1.4b", 50000, 1e-3, 1e-5, 2.6e9),
        ("titans", "350m", 28610, 4e-4, 4e-5, 1e9),  # arXiv 2501.00663, section 5.1: 15B tokens, 30B for 760M
        ("titans", "760m", 57220, 4e-4, 4e-5, 1e9),
    ],
)
def test_a_recipe_is_the_papers(
    recipe: str, size: str, num_steps: int, rate: float, final: float, warmup_tokens: float
) -> None:
    config = compose(f"train={recipe}", f"size={size}", "arch=ttt_linear")
    assert config.peak_learning_rate is not None
    settings, stream = training_settings(config.train, config.peak_learning_rate), config.train.stream
    assert stream["batch_tokens"] == 2**19 and stream["needle_fraction"] == 0.0
    assert (settings.num_steps, stream["num_steps"]) == (num_steps, num_steps)
    assert max(map(settings.rate, range(0, num_steps, 10))) == pytest.approx(rate, rel=1e-3)
    assert settings.rate(num_steps - 1) == pytest.approx(final)
    assert settings.warmup_fraction * num_steps * 2**19 == pytest.approx(warmup_tokens, rel=0.05)
    assert settings.betas == (0.9, 0.95)
    assert (settings.weight_decay, settings.gradient_clip) == (0.1, 1.0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_size_that_the_paper_has_not_needs_its_own_numbers(recipe: str) -> None:
    with pytest.raises(
        ValueError, match=r"no values for size=tiny; choose .*125m.* or set .*train\.num_steps=VALUE"
    ):
        compose(f"train={recipe}", "size=tiny")
    with pytest.raises(ValueError, match=r"peak_learning_rate='x' must be a number"):
        compose(f"train={recipe}", "train.peak_learning_rate=x", "size=125m")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains(
    recipe: str,
    quick_command: Callable[..., Any],
    tiny: list[str],
    points: Callable[..., list[Any]],
    tmp_path: Path,
) -> None:
    own = ["train.warmup_fraction=0.5", "train.micro_batch_tokens=128", "train.peak_learning_rate=2e-3"]
    arguments = [f"train={recipe}", "arch=ttt_mlp", "task=[]", *tiny, *own, f"output={tmp_path}"]
    code, _, err = quick_command(*arguments)
    assert code == 0, err
    (point,) = points(tmp_path, task="train")
    assert point.status == "ok" and point.metrics["learning_rate"] == 2e-3
    assert point.metrics["trained_tokens"] == 4 * 512
