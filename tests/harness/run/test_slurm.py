"""launcher=slurm, with stand-ins for Slurm's commands. `.ci/slurm` runs it on a real Slurm."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.config.compose import compose_config
from harness.record.schema import Point
from harness.run.job import JobSpec
from harness.run.plan import make_launcher
from harness.run.slurm import SlurmLauncher
from tests.conftest import compose_job

pytest.importorskip("submitit")

#: The commands of a cluster of one machine. The first NUM_LOST jobs and elements of arrays never run; with
#: LOSES_SINGLES, no job runs that is not an element of an array. The job LATE is warned of its time limit
#: while its model is being trained.
COMMANDS = {
    "sbatch": """
script = Path(sys.argv[1]).read_text()
number = len(list(here.glob("*.sh"))) + 1
(here / f"{number}.sh").write_text(script)
if "REFUSAL" in os.environ:
    sys.exit("sbatch: error: " + os.environ["REFUSAL"])
array = re.search("--array=0-([0-9]+)", script)
for name in [f"{number}_{i}" for i in range(int(array[1]) + 1)] if array else [str(number)]:
    (here / f"{name}.job").touch()
    is_lost = "LOSES_SINGLES" in os.environ and not array
    if is_lost or len(list(here.glob("*.job"))) <= int(os.environ.get("NUM_LOST", "0")):
        continue
    job = {"SLURM_JOB_ID": str(number), "SLURM_CPUS_PER_TASK": "1"}
    if array:
        job |= dict(zip(("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"), name.split("_")))
    command = [sys.executable, __file__.replace("sbatch", "node"), name, sys.argv[1]]
    (here / f"{name}.listed").touch()
    subprocess.Popen(command, env=os.environ | job, start_new_session=True,
                     stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("Submitted batch job", number)
""",
    "node": """
name, script = sys.argv[1], "trap '' USR2; " + Path(sys.argv[2]).read_text()
process = subprocess.Popen(["bash", "-c", script], start_new_session=True)
if name == os.environ.get("LATE"):
    is_training = False
    while not is_training:
        time.sleep(0.02)
        for path in Path(os.environ["JOBS"]).glob("*.in_flight.json"):
            with contextlib.suppress(FileNotFoundError):
                is_training = is_training or "transformer" in path.read_text()
    os.killpg(process.pid, signal.SIGUSR2)
process.wait()
if (here / f"{name}.requeued").exists():
    subprocess.run(["bash", "-c", script])
(here / f"{name}.listed").unlink()
""",
    "srun": """
command = sys.argv[sys.argv.index(sys.executable):]
with open(sys.argv[sys.argv.index("--error") + 1].replace("%t", "0").replace("%j", "x"), "a") as errors:
    sys.exit(subprocess.run(command, stderr=errors).returncode)
""",
    "squeue": """
(here / "asked").open("a").write("x")
if len((here / "asked").read_text()) <= int(os.environ.get("NUM_SILENT", "0")):
    sys.exit("squeue: error: Unable to contact slurm controller")
print(*(path.stem for path in here.glob("*.listed")), sep="\\n")
""",
    "scontrol": """
assert sys.argv[1] == "requeue"
(here / f"{sys.argv[2]}.requeued").touch()
""",
    "scancel": """
for name in sys.argv[1:]:
    (here / f"{name}.listed").unlink()
    (here / f"{name}.cancelled").touch()
""",
}
HEAD = f"""#!{sys.executable}
import contextlib, os, re, signal, subprocess, sys, time
from pathlib import Path

here = Path(os.environ["STAND_IN"])
"""


class Cluster:
    """The stand-ins, and what they were asked."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.bin = folder / "cluster", folder / "bin"
        self.folder.mkdir()
        self.bin.mkdir()
        for name, text in COMMANDS.items():
            (self.bin / name).write_text(HEAD + text)
            (self.bin / name).chmod(0o755)
        self.variables = {"PATH": f"{self.bin}:{environment['PATH']}", "STAND_IN": str(self.folder)}

    @property
    def submissions(self) -> list[str]:
        """The scripts that sbatch was given."""
        paths = sorted(self.folder.glob("*.sh"), key=lambda path: int(path.stem))
        return [path.read_text() for path in paths]


@pytest.fixture
def cluster(tmp_path: Path, environment: dict[str, str]) -> Cluster:
    return Cluster(tmp_path, environment)


@pytest.fixture
def here(cluster: Cluster, in_environment: None, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The cluster's commands are on the path of this process."""
    for name, value in cluster.variables.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def launcher(*overrides: str, **changes: Any) -> SlurmLauncher:
    """The launcher that the configuration makes."""
    overrides += tuple(f"launcher.{key}={value}" for key, value in changes.items())
    made = make_launcher(compose_config(["launcher=slurm", "launcher.poll_s=0.02", *overrides]))
    assert isinstance(made, SlurmLauncher)
    return made


def job(output: Path, name: str = "mamba", is_timing: bool = False) -> JobSpec:
    config = compose_job(f"arch={name}", "size=nano", f"output={output}")
    other = compose_job("arch=recurrent", "size=nano", f"output={output}")
    return JobSpec(is_timing=is_timing, configs=(config, other) if is_timing else (config,), command="")


def ignore(failures: list[Point], num_under_way: int) -> None:
    """Neither failures nor progress are looked at."""


def test_a_sweep_goes_on_where_a_job_is_lost_and_another_reaches_its_time_limit(
    cluster: Cluster,
    command: Callable[..., Any],
    tiny: list[str],
    tmp_path: Path,
    records: Callable[..., Any],
) -> None:
    """The first of two jobs is lost once and the second is requeued; the report comes when both are done."""
    result = command(
        *("-m", "arch=recurrent,transformer", *tiny, "task=[perplexity]", f"output={tmp_path / 'out'}"),
        *("tasks.perplexity.context_lengths_tokens=[128]", "tasks.perplexity.num_documents=2"),
        *("launcher=slurm", "launcher.poll_s=0.2"),
        **cluster.variables,
        NUM_LOST="1",
        LATE="1_1",
        JOBS=str(tmp_path / "out" / "jobs"),
    )
    assert result.code == 0, result.err
    assert (cluster.folder / "1_1.requeued").exists()
    assert (
        result.err.count("it is submitted again") == 1
        and "recurrent-nano-seed0: Slurm's job 1_0" in result.err
    )
    points = [record for record in records(tmp_path / "out") if isinstance(record, Point)]
    assert sorted((p.arch, p.task) for p in points) == [
        (arch, task) for arch in ("recurrent", "transformer") for task in ("cost", "perplexity", "train")
    ]
    assert {point.status for point in points} == {"ok"}
    assert (tmp_path / "out" / "report" / "index.html").exists() and "Report: " in result.out
    assert len(cluster.submissions) == 2 and "--array=0-1%2" in cluster.submissions[0]


def test_the_cells_of_a_job_that_is_lost_every_time_are_recorded_as_crashed(
    cluster: Cluster,
    command: Callable[..., Any],
    tiny: list[str],
    tmp_path: Path,
    records: Callable[..., Any],
) -> None:
    result = command(
        *("arch=recurrent", *tiny, "task=[perplexity]", f"output={tmp_path / 'out'}"),
        *("tasks.perplexity.context_lengths_tokens=[128]",),
        *("launcher=slurm", "launcher.poll_s=0.2", "launcher.num_tries=2"),
        **cluster.variables,
        NUM_LOST="2",
    )
    assert result.code == 1, result.err
    points = [record for record in records(tmp_path / "out") if isinstance(record, Point)]
    assert {(p.task, p.status) for p in points} == {("train", "crashed"), ("perplexity", "crashed")}
    assert all("Slurm's job 2 ended without a result" in str(point.reason) for point in points)


def test_a_cluster_that_loses_everything_ends_the_sweep_with_a_failure(
    cluster: Cluster, here: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here.setenv("NUM_LOST", "99")
    here.setenv("NUM_SILENT", "5")  # squeue that does not answer makes no job dead
    ended: list[Point] = []
    launcher(num_tries=2).run([job(tmp_path)], lambda failures, num_under_way: ended.extend(failures))
    assert [(p.arch, p.status) for p in ended] == [("mamba", "crashed")]
    assert "Slurm's job 3 ended without a result" in str(ended[0].reason)
    assert len(cluster.submissions) == 3
    assert len((cluster.folder / "asked").read_text()) >= 5 + 3 * 3


def test_models_are_an_array_and_a_timing_job_has_its_node_to_itself(
    cluster: Cluster, here: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here.setenv("NUM_LOST", "99")
    jobs = [job(tmp_path), job(tmp_path, is_timing=True), job(tmp_path, "transformer")]
    options = {"partition": "gpu", "account": "lab", "time_minutes": 90, "num_gpus": 2, "num_jobs_at_once": 1}
    launcher("+launcher.sbatch.qos=high", **options, num_tries=1).run(jobs, ignore)
    models, timing = cluster.submissions[:2]
    for text in (models, timing):
        for option in ("partition=gpu", "account=lab", "time=90", "gpus-per-node=2", "qos=high", "requeue"):
            assert re.search(rf"^#SBATCH --{option}$", text, re.MULTILINE), option
    assert "#SBATCH --array=0-1%1" in models and "--exclusive" not in models
    assert "--array" not in timing and "#SBATCH --exclusive" in timing


def test_what_is_under_way_is_cancelled_where_the_sweep_ends(
    cluster: Cluster, here: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A job is lost for good; the others, which wait in the queue, are cancelled by what its end raises."""
    here.setenv("NUM_LOST", "1")
    (cluster.bin / "node").write_text("")

    def interrupt(failures: list[Point], num_under_way: int) -> None:
        raise KeyboardInterrupt

    here.setenv("LOSES_SINGLES", "1")
    with pytest.raises(KeyboardInterrupt):
        jobs = [job(tmp_path), job(tmp_path, "transformer"), job(tmp_path, "recurrent")]
        launcher(num_tries=1).run(jobs, interrupt)
    assert {path.stem for path in cluster.folder.glob("*.cancelled")} == {"1_1", "1_2"}


def test_jobs_of_an_earlier_command_must_have_ended(
    cluster: Cluster, here: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here.setenv("NUM_LOST", "99")
    launcher(num_tries=1).run([job(tmp_path)], ignore)
    (cluster.folder / "1.listed").touch()
    with pytest.raises(ValueError, match=r"still in the queue; .* scancel 1\."):
        launcher().run([job(tmp_path)], ignore)
    launcher(num_tries=1).run([job(tmp_path / "other")], ignore)


def test_what_sbatch_refuses_is_one_sentence(
    cluster: Cluster, here: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here.setenv("REFUSAL", "invalid partition specified: gpu")
    with pytest.raises(ValueError, match=r"^sbatch refuses the job: .*invalid partition specified: gpu$"):
        launcher().run([job(tmp_path)], ignore)


def test_without_slurm_or_submitit_the_sweep_does_not_begin(
    command: Callable[..., Any], tiny: list[str], tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    result = command(
        "arch=mamba", *tiny, "launcher=slurm", f"output={tmp_path / 'out'}", PATH=str(tmp_path / "empty")
    )
    assert result.code == 2 and not (tmp_path / "out").exists()
    (line,) = result.error_lines
    assert line.startswith(
        "error: launcher=slurm needs Slurm's sbatch, srun, squeue, scancel on this machine;"
    )
    here.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match=r"needs the package submitit; install it with .*\[slurm\]"):
        launcher()


def test_a_time_limit_that_leaves_no_time_is_a_mistake(here: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^launcher\.time_minutes=1 must be larger"):
        launcher(time_minutes=1)


def test_an_unknown_key_of_the_launcher_is_a_mistake(here: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"Unknown key of launcher .*'partitoin'. Did you mean 'partition'"):
        make_launcher(compose_config(["launcher=slurm", "+launcher.partitoin=gpu"]))
