"""An architecture that lives in another package is added with a YAML file alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.config.build import checked_job
from harness.config.compose import compose_config, resolve
from harness.config.match import MATCH_TOLERANCE, matched_model_config, mismatch_text
from harness.config.schema import parse_job
from harness.record.schema import Point

CONF = Path(__file__).resolve().parent / "plugin" / "conf"

Command = Callable[..., tuple[int, str, str]]


def test_it_is_trained_and_measured_like_the_others(
    quick_command: Command,
    tiny: list[str],
    tiny_tasks: list[str],
    points: Callable[..., list[Point]],
    tmp_path: Path,
) -> None:
    arguments = [f"--config-dir={CONF}", "arch=toy", *tiny, *tiny_tasks, f"output={tmp_path}"]
    code, _, err = quick_command(*arguments)
    assert code == 0, err
    found = points(tmp_path, arch="toy")
    assert {p.task for p in found} == {"train", "cost", "perplexity", "needle", "latency"}
    assert {p.status for p in found} == {"ok"}
    (train,) = points(tmp_path, task="train")
    assert abs(train.details["parameter_mismatch"]) < 0.02


def test_it_is_among_the_architectures_of_a_latency_job(
    quick_command: Command, tiny: list[str], points: Callable[..., list[Point]], tmp_path: Path
) -> None:
    latency = ["task=[latency]", "tasks.latency.context_lengths_tokens=[16]", "tasks.latency.num_samples=1"]
    arguments = [f"--config-dir={CONF}", "archs=[transformer,toy]", *tiny, *latency]
    code, _, err = quick_command(*arguments, f"output={tmp_path}")
    assert code == 0, err
    assert [p.arch for p in points(tmp_path, task="latency")] == ["transformer", "toy"] * 2


def test_a_yaml_file_that_lacks_something_says_what(
    quick_command: Command, tiny: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "conf" / "arch"
    folder.mkdir(parents=True)
    text = (CONF / "arch" / "toy.yaml").read_text()
    for line, words in (
        ("learning_rate: 1.0e-3\n", "arch lacks learning_rate."),
        (
            "  d_ff: ${size.d_ff}\n",
            "Unknown arch.match.key: 'd_ff'. Valid: d_model, mixers, num_layers, vocab_size.",
        ),
        ("  vocab_size: ${data.vocab_size}\n", "arch.model (archs.decoder.Decoder) lacks vocab_size."),
    ):
        assert line in text
        (folder / "broken.yaml").write_text(text.replace(line, ""))
        arguments = [f"--config-dir={folder.parent}", "arch=broken", *tiny, "task=[]"]
        code, _, err = quick_command(*arguments, f"output={tmp_path / 'o'}")
        assert code == 2 and f"error: {words}" in err and "Traceback" not in err


def test_what_is_not_matched_is_compared_and_said(in_environment: None) -> None:
    overrides = ["arch=toy", "arch.match=null", "arch.model.d_ff=4"]
    model_config, mismatch = matched_model_config(parse_job(resolve(compose_config(overrides, str(CONF)))))
    assert model_config["d_ff"] == 4 and mismatch is not None and mismatch < -MATCH_TOLERANCE
    assert mismatch_text(mismatch).endswith(
        "against the reference; more than 2%, and left so, for arch.match is null."
    )
    assert mismatch_text(0.011) == "parameters +1.10% against the reference."
    assert matched_model_config(parse_job(resolve(compose_config(["arch=transformer"]))))[1] is None


def test_a_failing_constructor_ends_in_its_own_sentence(in_environment: None) -> None:
    config = resolve(compose_config(["arch=toy", "size.d_model=-1"], str(CONF)))
    with pytest.raises(ValueError, match=r"size.d_model=-1 must be positive"):
        checked_job(config)
    config = resolve(compose_config(["arch=toy", "match=none"], str(CONF)))
    assert matched_model_config(checked_job(config))[1] is None
