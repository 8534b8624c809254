"""The commands around the code: make, .ci/regress, .ci/run, and the list of packages.

make runs in a copy of what it needs, on a stand-in for Python that notes what it is asked to do.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from setuptools import find_packages

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
TOOLS = ("sh", "bash", "make", "awk", "cat", "dirname", "grep", "head", "ls", "mkdir", "rm", "sed", "tail")
TOOLS += ("echo", "tee", "touch")

STAND_IN = """#!{python}
import os, shutil, sys
from pathlib import Path

arguments, here = sys.argv[1:], Path(__file__)
version = os.environ.get("VERSION_OF_" + here.name.replace(".", "_"), "3.12")
if arguments[0] == "-c":
    if "version_info" in arguments[1]:
        print(version)
    else:
        exec(arguments[1])
    sys.exit()
with open(os.environ["NOTES"], "a") as notes:
    print(here.name, *arguments, file=notes)
if arguments[:2] == ["-m", "venv"]:
    target = Path(arguments[-1]) / "bin" / "python"
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(here, target)
if arguments[:2] == ["-m", "pytest"]:
    print("===== 3 passed, 1 skipped in 0.10s =====")
sys.exit(int(os.environ.get("STATUS_OF_" + arguments[1].replace(".", "_"), "0")))
"""

pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in TOOLS), reason="needs make and the usual Unix tools"
)


class Workshop:
    """A copy of the Makefile's surroundings with a stand-in `python3`."""

    def __init__(self, folder: Path) -> None:
        self.root, self.tools, self.notes = folder / "project", folder / "bin", folder / "notes"
        self.root.mkdir()
        self.tools.mkdir()
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(REPOSITORY / name, self.root / name)
        shutil.copytree(REPOSITORY / ".ci", self.root / ".ci")
        for tool in TOOLS:
            (self.tools / tool).symlink_to(shutil.which(tool) or tool)
        self.add_python("python3")

    def add_python(self, name: str) -> None:
        """A stand-in on the path, Python 3.12 unless VERSION_OF_<name> says otherwise."""
        path = self.tools / name
        path.write_text(STAND_IN.replace("{python}", sys.executable))
        path.chmod(0o755)

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a command there."""
        known = {"PATH": str(self.tools), "NOTES": str(self.notes), "HOME": str(self.root)}
        return subprocess.run(
            command,
            cwd=self.root,
            env={**known, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def take_notes(self) -> list[str]:
        """What the stand-ins were asked since the last call."""
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        self.notes.unlink(missing_ok=True)
        return lines


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


@pytest.fixture
def installed(workshop: Workshop) -> Workshop:
    assert workshop.run("make", ".venv/.installed").returncode == 0
    workshop.take_notes()
    return workshop


def test_make_alone_lists_the_targets(workshop: Workshop) -> None:
    result = workshop.run("make")
    assert result.returncode == 0
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    targets = set(phony.split()) - {"python-fits", "reinstall"}  # which only other targets need
    assert set(re.findall(r"^  make ([\w-]+) {2,}", result.stdout, re.MULTILINE)) == targets
    assert workshop.take_notes() == [], "help installs nothing"


def test_the_first_run_installs_and_the_second_does_not(workshop: Workshop) -> None:
    result = workshop.run("make", "test")
    assert result.returncode == 0, result.stderr
    venv, install, compile_all, test = workshop.take_notes()
    assert venv == "python3 -m venv --clear .venv"
    assert compile_all.startswith("python -m compileall") and compile_all.endswith(" .venv/lib")
    assert install.startswith("python -m pip install") and install.endswith("--editable .[dev]")
    assert test.startswith("python -m pytest")
    assert workshop.run("make", "test", "PYTEST_ARGS=tests/archs -x").returncode == 0
    assert workshop.take_notes() == [f"{test} tests/archs -x"]


def test_what_make_test_leaves_out_are_markers_that_exist(installed: Workshop) -> None:
    assert installed.run("make", "test").returncode == 0
    (test,) = installed.take_notes()
    left_out = re.search(r"-m not \((.*)\)", test)
    known = {line.split(":")[0] for line in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    assert left_out is not None and set(left_out[1].split(" or ")) <= known


def test_a_changed_list_of_dependencies_is_installed(installed: Workshop) -> None:
    stamp = (installed.root / ".venv" / ".installed").stat().st_mtime
    os.utime(installed.root / "pyproject.toml", (stamp + 10, stamp + 10))
    assert installed.run("make", "test").returncode == 0
    install, _, test = installed.take_notes()
    assert "pip install" in install and "venv" not in install and "pytest" in test


def test_a_failed_installation_is_tried_again(workshop: Workshop) -> None:
    assert workshop.run("make", "test", STATUS_OF_pip="1").returncode != 0
    assert not any("pytest" in line for line in workshop.take_notes())
    assert workshop.run("make", "test").returncode == 0
    assert any("pip install" in line for line in workshop.take_notes())


def test_an_environment_whose_python_is_gone_is_built_anew(installed: Workshop) -> None:
    (installed.root / ".venv" / "bin" / "python").unlink()
    assert installed.run("make", "test").returncode == 0
    assert installed.take_notes()[0] == "python3 -m venv --clear .venv"


@pytest.mark.parametrize(
    ("version", "what"), [("2.7", "old"), ("3.9", "old"), ("3.10", "old"), ("3.14", "new")]
)
def test_a_python_that_does_not_fit_is_told_so(workshop: Workshop, version: str, what: str) -> None:
    for command in (["make", "bench"], ["make", "bench", "PYTHON=python3"]):
        result = workshop.run(*command, VERSION_OF_python3=version)
        assert result.returncode != 0
        assert f"python3 is Python {version}, which is too {what}; longarch" in result.stderr.replace(
            ":", ";"
        )
        assert "3.11, 3.12 or 3.13" in result.stderr
        assert workshop.take_notes() == [] and not (workshop.root / ".venv").exists()


def test_a_machine_without_python_is_told_what_to_install(workshop: Workshop) -> None:
    (workshop.tools / "python3").unlink()
    result = workshop.run("make", "test")
    assert result.returncode != 0
    assert "python3 cannot be run; longarch needs Python 3.11, 3.12 or 3.13." in result.stderr


def test_another_python_on_the_path_serves_where_python3_does_not(workshop: Workshop) -> None:
    workshop.add_python("python3.12")
    result = workshop.run("make", "test", VERSION_OF_python3="3.9")
    assert result.returncode == 0
    assert "python3 is Python 3.9, which is too old; using python3.12." in result.stderr
    assert workshop.take_notes()[0] == "python3.12 -m venv --clear .venv"


def test_a_named_python_must_fit_even_where_all_is_installed(installed: Workshop) -> None:
    result = installed.run("make", "test", "PYTHON=python3", VERSION_OF_python3="3.14")
    assert result.returncode != 0 and "too new" in result.stderr
    assert installed.take_notes() == []


def test_torch_can_come_from_an_index_of_its_own(workshop: Workshop) -> None:
    assert workshop.run("make", "test", "TORCH_INDEX_URL=https://torch.example/cpu").returncode == 0
    torch, rest = (line for line in workshop.take_notes() if "pip install" in line)
    (requirement,) = (line for line in PROJECT["project"]["dependencies"] if line.startswith("torch"))
    assert torch.endswith(f"--index-url https://torch.example/cpu {requirement}")
    assert "--index-url" not in rest


@pytest.mark.parametrize(
    ("target", "command"), [("bench", "harness.bench"), ("smoke", "harness experiment=smoke")]
)
def test_overrides_are_passed_through(installed: Workshop, target: str, command: str) -> None:
    assert installed.run("make", target, "ARGS=seed=1 train.num_steps=2").returncode == 0
    assert installed.take_notes() == [f"python -m {command} seed=1 train.num_steps=2"]


def test_the_latest_results_are_reported(installed: Workshop) -> None:
    result = installed.run("make", "report")
    assert result.returncode != 0 and "no results yet" in result.stderr
    for seconds, name in ((3000, "new"), (1000, "old")):
        folder = installed.root / "outputs" / name / "records"
        folder.mkdir(parents=True)
        os.utime(folder, (seconds, seconds))
    assert installed.run("make", "report").returncode == 0
    assert installed.run("make", "report", "EXPERIMENT=old").returncode == 0
    assert installed.take_notes() == ["python -m reports outputs/new", "python -m reports outputs/old"]


@pytest.mark.parametrize(
    ("harness", "compare", "expected"),
    [(0, 0, 0), (0, 1, 1), (0, 2, 2), (1, 1, 1), (1, 0, 0), (2, 0, 2), (130, 0, 2)],
)
def test_regress_ends_as_the_comparison_does(
    installed: Workshop, harness: int, compare: int, expected: int
) -> None:
    old = installed.root / "outputs" / "regress" / "records" / "old.jsonl"
    old.parent.mkdir(parents=True)
    old.touch()
    statuses = {"STATUS_OF_harness": str(harness), "STATUS_OF_reports_regression_compare": str(compare)}
    result = installed.run("sh", ".ci/regress", **statuses)
    assert result.returncode == expected
    assert not old.exists(), "a check begins anew"
    sweep, *comparison = installed.take_notes()
    assert sweep == "python -m harness experiment=regress output=outputs/regress"
    is_compared = harness in (0, 1)
    expected_comparison = "python -m reports.regression.compare outputs/regress tests/baselines/smoke.json"
    assert comparison == ([expected_comparison] if is_compared else [])
    assert (installed.run("make", "regress", **statuses).returncode == 0) == (expected == 0)


def test_a_baseline_is_renewed_only_from_a_whole_sweep(installed: Workshop) -> None:
    assert installed.run("make", "baseline", STATUS_OF_harness="1").returncode != 0
    assert not any("reports.regression.compare" in line for line in installed.take_notes())
    assert installed.run("make", "baseline").returncode == 0
    assert installed.take_notes()[-1].endswith("outputs/regress tests/baselines/smoke.json --renew")


def test_continuous_integration_runs_all_steps_and_prints_the_totals(workshop: Workshop) -> None:
    result = workshop.run("bash", ".ci/run")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-2] == "Tests: 3 passed, 1 skipped in 0.10s"
    notes = "\n".join(workshop.take_notes())
    for command in ("ruff check .", "ruff format --check .", "mypy", "pytest", "reports.regression.compare"):
        assert f"python -m {command}" in notes
    assert "lint-imports" in notes


@pytest.mark.parametrize("module", ["ruff", "mypy", "pytest", "reports_regression_compare", "pip"])
def test_continuous_integration_fails_where_a_step_does(workshop: Workshop, module: str) -> None:
    result = workshop.run("bash", ".ci/run", **{f"STATUS_OF_{module}": "1"})
    assert result.returncode == 1
    if module != "pip":
        assert "3 passed" in result.stdout, "the other steps run all the same"


def test_the_workflow_runs_the_same_script() -> None:
    workflow = (REPOSITORY / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert "run: bash .ci/run" in workflow


def test_every_package_is_listed() -> None:
    on_disk = {
        ".".join(path.parent.relative_to(REPOSITORY).parts)
        for room in ("archs", "tasks", "harness", "reports")
        for path in (REPOSITORY / room).rglob("__init__.py")
    }
    folders = {
        path.parent for room in ("archs", "tasks", "harness") for path in (REPOSITORY / room).rglob("*.py")
    }
    assert all((folder / "__init__.py").exists() for folder in folders)
    found = find_packages(str(REPOSITORY), **PROJECT["tool"]["setuptools"]["packages"]["find"])
    assert sorted(on_disk) == sorted(found)
