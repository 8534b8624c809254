"""One tiny sweep through the real command: two architectures and the latency job."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.record.schema import Header, Point
from reports.results.load import load

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAMES = ("transformer", "recurrent")

Points = Callable[..., list[Point]]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def arguments(tiny: list[str], tiny_tasks: list[str]) -> list[str]:
    return ["experiment=smoke", f"archs=[{','.join(NAMES)}]", *tiny, *tiny_tasks]


@pytest.fixture(scope="session")
def sweep(
    command: Command, arguments: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str, str]:
    """The finished sweep's folder, and what it printed."""
    output = tmp_path_factory.mktemp("sweep") / "output"
    code, out, err = command(*arguments, f"output={output}", LONGARCH_GIT_COMMIT=f"{COMMIT}-dirty")
    assert code == 0, err
    return output, out, err


@pytest.fixture
def headers(sweep: tuple, records: Callable[[Path], list]) -> list[Header]:
    return [record for record in records(sweep[0]) if isinstance(record, Header)]


def test_every_cell_is_measured_once_and_well(sweep: tuple, points: Points) -> None:
    found = points(sweep[0])
    assert len({p.key for p in found}) == len(found)
    assert {p.status for p in found} == {"ok"}
    for arch in NAMES:
        tasks = [p.task for p in found if p.arch == arch]
        assert {name: tasks.count(name) for name in tasks} == {
            "train": 1,
            "cost": 1,
            "perplexity": 1,
            "needle": 2,
            "latency": 4,
        }
    assert [p.arch for p in found if p.task == "calibration"] == [""]


def test_the_header_declares_every_number_of_its_points(
    sweep: tuple, headers: list[Header], points: Points
) -> None:
    declared = {
        (header.run_id, task): {metric.name for metric in metrics}
        for header in headers
        for task, metrics in header.metrics.items()
    }
    for point in points(sweep[0]):
        assert point.metrics.keys() <= declared[point.run_id, point.task]


def test_training_is_recorded_with_its_curve(sweep: tuple, points: Points) -> None:
    for point in points(sweep[0], task="train"):
        assert point.samples["step"] == [0, 1, 2, 3] and len(point.samples["loss_nats"]) == 4
        assert point.samples["validation_step"] == [2, 4]
        assert point.metrics["trained_tokens"] == 4 * 512
        assert point.details["trained_lengths_tokens"] == [128]
        assert point.details["device"] == "cpu" and "parameter_mismatch" in point.details
    (transformer,) = points(sweep[0], task="train", arch="transformer")
    assert transformer.details["implementations"]["attention"] in ("plain", "sdpa")


def test_parameters_agree_within_two_percent(sweep: tuple, points: Points) -> None:
    counts = [p.metrics["num_parameters"] for p in points(sweep[0], task="train")]
    assert max(counts) / min(counts) < 1.02
    assert "recurrent: parameters" in sweep[1]


def test_latency_keeps_raw_samples(sweep: tuple, points: Points) -> None:
    for point in points(sweep[0], task="latency"):
        assert len(point.samples["time_ms"]) == 2 and min(point.samples["time_ms"]) > 0
        assert point.metrics["state_bytes"] > 0


def test_headers_say_what_ran_where(sweep: tuple, headers: list[Header]) -> None:
    assert len(headers) == 3
    for header in headers:
        environment = header.environment
        assert environment["git_commit"] == COMMIT and environment["is_dirty"] is True
        assert environment["device"] == "cpu" and environment["gpu_name"] is None
        assert environment["torch"] and environment["python"] and environment["cpu_name"]
        assert header.experiment == "smoke" and header.config["train"]["num_steps"] == 4
        assert header.command.startswith("python -m harness experiment=smoke")
        assert header.started_at.endswith("+00:00")
    quality = [h for h in headers if not h.job.startswith("latency")]
    assert len({h.data_hash for h in quality}) == 1 and quality[0].data_hash
    assert len({h.config_hash for h in headers}) == 3


def test_the_command_ends_with_ranking_and_report(sweep: tuple) -> None:
    output, out, err = sweep
    assert out.splitlines()[-1] == f"Report: {output / 'report' / 'index.html'}"
    assert (output / "report" / "index.html").stat().st_size > 10_000
    assert list((output / "report").rglob("*.png"))
    assert "Transformer" in out and "LSTM" in out
    assert "3 jobs, results in" in err and "2/3 jobs done after" in err and "left" in err
    assert "Traceback" not in err and "Warning" not in err


def test_two_train_at_once_and_latency_is_measured_alone(sweep: tuple, headers: list[Header]) -> None:
    lines = [line for line in sweep[2].splitlines() if line.startswith("-- ") or "jobs done" in line]
    assert [line.partition("-nano")[0].partition(" jobs")[0] for line in lines] == [
        "-- transformer",
        "-- recurrent",
        "1/3",
        "2/3",
        "-- latency",
        "3/3",
    ]
    assert {h.job.partition("-")[0]: h.config["num_workers"] for h in headers} == {
        "transformer": 2,
        "recurrent": 2,
        "latency": 1,
    }


def test_the_same_command_measures_nothing_twice_and_mends_a_damaged_line(
    sweep: tuple, arguments: list[str], quick_command: Command, points: Points, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    shutil.copytree(sweep[0], output)
    (path,) = (output / "records").glob("transformer-*.jsonl")
    lines = path.read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines) if '"perplexity"' in line and '"point"' in line]
    before = {p.key: p for p in points(output)}
    lines[number] = lines[number][: len(lines[number]) // 2]
    path.write_text("\n".join(lines) + "\n")
    code, _, err = quick_command(*arguments, f"output={output}")
    assert code == 0
    assert "1 damaged line(s) are left as they are; their cells are measured again." in err
    assert path.read_text().splitlines()[: len(lines)] == lines, "records are append-only"
    after = points(output)
    assert len({p.key for p in after}) == len(after) == len(before)
    for point in after:
        old = before[point.key]
        if point.task == "perplexity" and point.arch == "transformer":
            assert point.run_id != old.run_id and point.metrics == old.metrics, "same numbers again"
        else:
            assert point == old


def test_other_data_under_the_same_name_are_measured_anew(
    quick_command: Command, tiny: list[str], points: Points, tmp_path: Path
) -> None:
    text, output = tmp_path / "text", tmp_path / "output"
    shutil.copytree(Path(__file__).resolve().parent.parent.parent / "corpus" / "stories", text)
    kept = [override for override in tiny if not override.startswith("data.path")]
    arguments = [*kept, "task=[]", f"data.path={text}", f"output={output}"]
    for _ in range(2):
        assert quick_command(*arguments)[0] == 0
        assert len(points(output, task="train")) == 1
    (text / "story_00.txt").write_text("Something else. " * 400)
    assert quick_command(*arguments)[0] == 0
    assert len(points(output, task="train")) == 2


def test_a_further_task_and_other_threads_measure_nothing_anew(
    quick_command: Command, points: Points, tiny: list[str], tmp_path: Path
) -> None:
    """And back to the first configuration, the report is about that one again."""
    output = tmp_path / "output"
    arguments = ["arch=transformer", *tiny, f"output={output}"]
    perplexity = ["task=[perplexity]", "tasks.perplexity.context_lengths_tokens=[64]"]
    assert quick_command(*arguments, "task=[]")[0] == 0
    before = points(output)
    assert quick_command(*arguments, *perplexity, "num_threads=1", "experiment_name=b")[0] == 0
    after = points(output)
    assert after[: len(before)] == before
    assert {point.task for point in after[len(before) :]} == {"perplexity"}
    assert len(list((output / "records").iterdir())) == 1, "one file per job and machine"
    assert quick_command(*arguments, "task=[]", "train.num_steps=5")[0] == 0
    assert quick_command(*arguments, "task=[]")[0] == 0
    trained = load([output]).ok("train")
    assert [point.metrics["trained_tokens"] for point in trained] == [before[-1].metrics["trained_tokens"]]


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_damaged_checkpoint_is_one_sentence(
    damage: str, sweep: tuple, arguments: list[str], quick_command: Command, points: Points, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    shutil.copytree(sweep[0], output)
    (path,) = (output / "records").glob("transformer-*.jsonl")
    lines = [line for line in path.read_text().splitlines() if '"needle"' not in line or "header" in line]
    path.write_text("\n".join(lines) + "\n")
    before = points(output)
    for checkpoint in (output / "checkpoints").glob("*.safetensors"):
        content = checkpoint.read_bytes()
        damaged = {"truncated": content[: len(content) // 2], "garbage": b"\xff" * 5000, "empty": b""}
        checkpoint.write_bytes(damaged[damage])
    code, _, err = quick_command(*arguments, f"output={output}")
    assert code == 2
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "is damaged" in errors[0] and "delete it" in errors[0]
    assert "Traceback" not in err and points(output) == before


def test_the_specification_of_a_job_is_json_and_removed(sweep: tuple) -> None:
    assert list((sweep[0] / "jobs").iterdir()) == []
    for path in (sweep[0] / "records").iterdir():
        for line in path.read_text().splitlines():
            assert json.loads(line)["schema_version"] == 2


@pytest.mark.parametrize("given", ["outputs/x", "{here}/outputs/x", "{beside}/elsewhere"])
def test_records_name_the_output_folder_from_where_the_run_was_started(
    quick_command: Command,
    records: Callable[[Path], list],
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: str,
) -> None:
    """What lies below is named without a machine's own path, so that records can be published."""
    here = tmp_path / "clone"
    here.mkdir()
    monkeypatch.chdir(here)
    output = given.format(here=here, beside=tmp_path)
    code, _, err = quick_command("arch=transformer", "task=[]", f"output={output}", *tiny)
    assert code == 0, err
    (header,) = (record for record in records(here / output) if isinstance(record, Header))
    expected = "outputs/x" if "outputs" in given else str(tmp_path / "elsewhere")
    assert header.config["output"] == expected
