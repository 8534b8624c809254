"""The static cost card: without training, and equal to the model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from archs.base import SequenceModel, state_bytes
from harness.cost import main
from reports.results.load import load


def card_of(capsys: pytest.CaptureFixture[str], *overrides: str) -> tuple[dict[str, Any], str]:
    assert main(list(overrides)) == 0
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1]), out


@pytest.mark.parametrize("name", ["transformer", "mamba", "titans_mac", "transformer_squared"])
def test_the_last_line_is_one_json_object(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    card, out = card_of(capsys, f"arch={name}", "size=nano")
    assert {
        "num_parameters",
        "dtype",
        "state_bytes",
        "prefill_flops_per_token",
        "decode_flops_per_token",
    } <= set(card)
    lengths = [str(2**power) for power in range(10, 21)]
    for key in ("state_bytes", "prefill_flops_per_token", "decode_flops_per_token"):
        assert list(card[key]) == lengths
        assert all(value > 0 for value in card[key].values())
    assert card["dtype"] == "float32" and isinstance(card["num_parameters"], int)
    assert f"{card['num_parameters']:,} parameters" in out


def test_the_card_equals_the_model(
    capsys: pytest.CaptureFixture[str], new_model: Callable[..., SequenceModel]
) -> None:
    card, _ = card_of(capsys, "arch=transformer", "size=nano", "match=none")
    model = new_model("transformer", dtype=torch.float32)
    assert card["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert card["state_bytes"]["1024"] == state_bytes(model.init_state(1, 1024))
    assert card["prefill_flops_per_token"]["1024"] == model.flops(1024, "prefill").total / 1024
    assert card["decode_flops_per_token"]["1024"] == model.flops(1024, "decode").total


def test_attention_grows_with_context_and_a_recurrent_state_does_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    attention, _ = card_of(capsys, "arch=transformer", "size=nano")
    recurrent, out = card_of(capsys, "arch=recurrent", "size=nano")
    assert attention["state_bytes"]["1048576"] == 1024 * attention["state_bytes"]["1024"]
    assert len(set(recurrent["state_bytes"].values())) == 1
    assert attention["decode_flops_per_token"]["1048576"] > 10 * attention["decode_flops_per_token"]["1024"]
    assert re.search(r"^parameters [+-]\d+\.\d\d% against the reference\.$", out, re.MULTILINE)


def test_dispatch_is_apart(capsys: pytest.CaptureFixture[str]) -> None:
    card, out = card_of(capsys, "arch=transformer_squared", "size=nano")
    plain, plain_out = card_of(capsys, "arch=transformer", "size=nano")
    dispatch, prefill = card["dispatch_flops_per_token"], card["prefill_flops_per_token"]
    assert list(dispatch) == list(prefill)
    for length in dispatch:  # as much as a prefill, but for head and classifier
        assert 0.5 * prefill[length] < dispatch[length] < prefill[length]
    assert "dispatch FLOPs/token" in out and "is apart from the prefill" in out
    assert "dispatch_flops_per_token" not in plain and "ispatch" not in plain_out


def test_half_the_bytes_in_bfloat16(capsys: pytest.CaptureFixture[str]) -> None:
    full, _ = card_of(capsys, "size=nano")
    half, _ = card_of(capsys, "size=nano", "dtype=bfloat16")
    assert half["dtype"] == "bfloat16" and half["num_parameters"] == full["num_parameters"]
    assert 2 * half["state_bytes"]["1024"] == full["state_bytes"]["1024"]


def test_the_command_itself(command: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = command("arch=transformer", "size=small", module="harness.cost")
    assert code == 0 and err == ""
    assert json.loads(out.splitlines()[-1])["num_parameters"] > 5_000_000


def test_with_output_the_card_is_a_point(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["arch=mamba", "size=nano", f"output={tmp_path}"]) == 0
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    results = load([tmp_path])
    (point,) = results.points
    assert (point.task, point.arch, point.size, point.status) == ("cost", "mamba", "nano", "ok")
    assert {**point.metrics, **point.details} == values
    assert point.metrics.keys() <= {metric.name for metric in results.metrics("cost")}
