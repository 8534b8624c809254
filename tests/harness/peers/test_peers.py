"""The comparison with public implementations: parity before any time, and sentences for what is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from harness.peers import __main__ as peers
from harness.record.schema import Header, Point, read

TRANSFORMERS_LINES = [name for name, line in peers.LINES.items() if line.package == "transformers"]


@pytest.fixture(autouse=True)
def threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_line_runs_and_keeps_its_times(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra `peers`")
    settings = ["--tokens", "33", "--rounds", "2", "--threads", "1", "--output", str(tmp_path)]
    code = peers.main([*TRANSFORMERS_LINES, *settings])
    *lines, last = capsys.readouterr().out.splitlines()
    values = json.loads(last)
    assert len(lines) == len(values["results"]) == len(TRANSFORMERS_LINES)
    for line, result in zip(lines, values["results"], strict=True):
        assert line.startswith(result["line"]) and ("MISSED" in line) == (
            result["speed"] < result["minimum_speed"]
        )
        ratios = [p / o for p, o in zip(result["peer_ms"], result["our_ms"], strict=True)]
        assert min(ratios) <= result["speed"] <= max(ratios) and len(ratios) == 2
        same_weights = result["line"] in ("mamba", "mamba2", "transformer")
        assert (result["largest_difference"] is not None) == same_weights
    assert code == int(any(r["speed"] < r["minimum_speed"] for r in values["results"]))
    (path,) = (tmp_path / "records").iterdir()
    header, *points = list(read(path))
    assert isinstance(header, Header)
    for point, result in zip(points, values["results"], strict=True):
        assert isinstance(point, Point) and point.task == "peer"
        assert point.metrics.keys() == {metric.name for metric in header.metrics["peer"]}
        assert point.cell == {"case": result["line"], "context_tokens": 33}
        quartiles = [point.metrics["speed_low"], point.metrics["speed_high"]]
        assert point.metrics["speed"] == result["speed"] and quartiles == result["speed_quartiles"]


def test_what_is_not_alike_and_what_the_peer_lacks_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins for the models: the lines' words reach the terminal and the JSON."""
    calls = (lambda: torch.zeros(3), lambda: torch.zeros(3))
    for name in ("mamba", "titans_memory"):
        fields = {**vars(peers.LINES[name]), "make": lambda num_tokens: calls, "package": "torch"}
        monkeypatch.setitem(peers.LINES, name, peers.Line(**fields))
    peers.main(["mamba", "titans_memory", "--rounds", "1", "--threads", "1"])
    mamba, titans, last = capsys.readouterr().out.splitlines()
    assert "same weights" in mamba and "loop in Python over the tokens" in mamba
    assert "same weights" not in titans
    for words in (
        "gradients of all chunks at once, at the starting weights",
        "one decay and one momentum a chunk",
        "its loss is the mean over a value's entries",
        "the weights after every chunk at once",
    ):
        assert words in titans
    results = {result["line"]: result for result in json.loads(last)["results"]}
    assert results["mamba"]["note"] in mamba and results["mamba"]["largest_difference"] == 0
    assert results["titans_memory"]["difference"] in titans
    assert results["titans_memory"]["largest_difference"] is None


def test_what_differs_is_not_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = (lambda: torch.zeros(3), lambda: torch.ones(3))
    line = peers.Line(make=lambda num_tokens: calls, package="torch", peer="Other", minimum_speed=1.0)
    monkeypatch.setitem(peers.LINES, "mamba", line)
    assert peers.main(["mamba", "--threads", "1"]) == 2
    captured = capsys.readouterr()
    assert "differ by 1 on the same weights" in captured.err and not captured.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], ["no line 'nothing'", "mamba2"]),
        (["mamba", "--rounds", "0"], ["--rounds 0 must be positive"]),
        (["titans_memory"], ["titans_pytorch, which is not installed", "longarch[peers]"]),
    ],
)
def test_what_is_wrong_is_a_sentence(
    arguments: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "titans_pytorch", None)
    monkeypatch.setitem(peers.LINES, "mamba", peers.LINES["mamba"].__class__(**{
        **vars(peers.LINES["mamba"]), "package": "torch"
    }))  # fmt: skip
    assert peers.main(arguments) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert all(word in error for word in words), error
