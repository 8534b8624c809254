"""A model of transformers stands in a sweep beside ours, measured as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from harness import cost
from harness.record.schema import Point

Command = Callable[..., tuple[int, str, str]]
Points = Callable[..., list[Point]]

transformers = pytest.importorskip("transformers", reason="needs the extra `huggingface`")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A GPT-NeoX, which we do not implement, over bytes and a document start: 257 tokens."""
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=257, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "small-neox")
    return tmp_path / "small-neox"


def test_it_is_measured_and_not_trained(
    quick_command: Command,
    tiny: list[str],
    tiny_tasks: list[str],
    points: Points,
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "output"
    arguments = ["arch=huggingface", f"arch.path={checkpoint}", *tiny, *tiny_tasks, f"output={output}"]
    code, _, err = quick_command(*arguments)
    assert code == 0, err
    found = points(output)
    assert {p.task for p in found} >= {"train", "cost", "perplexity", "needle", "latency"}
    assert {p.status for p in found} == {"ok"}
    assert {p.arch for p in found} - {""} == {"small-neox"}
    (train,) = points(output, task="train")
    unknown = ("trained_tokens", "train_seconds", "tokens_per_s", "learning_rate", "num_skipped_steps")
    assert all(train.metrics[name] is None for name in unknown)
    assert train.details["checkpoint"] == str(checkpoint)
    assert train.details["implementations"] == {"attention": "sdpa"}
    assert {p.metrics["is_trained_length"] for p in points(output, task="needle")} == {None}


def test_the_data_must_have_its_vocabulary(
    quick_command: Command, tiny: list[str], checkpoint: Path, tmp_path: Path
) -> None:
    overrides = [f"arch.path={checkpoint}", "data.vocab_size=300", *tiny, f"output={tmp_path / 'output'}"]
    result = quick_command("arch=huggingface", *overrides)
    assert result.code == 2
    (line,) = result.error_lines
    assert "data.vocab_size=300" in line and "257" in line


def test_the_cost_card_reads_no_weights(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = cost.main(["arch=huggingface", f"arch.path={checkpoint}"])
    out, err = capsys.readouterr()
    assert code == 0, err
    values = json.loads(out.splitlines()[-1])
    assert values["state_bytes"]["1024"] == 2 * 1024 * 16 * 4
    assert "small-neox" in out
