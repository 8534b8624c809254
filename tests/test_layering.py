"""Who may import whom: the contracts of pyproject.toml, and what they cannot say."""

from __future__ import annotations

import graphlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
ROOMS = ("archs", "tasks", "harness", "reports")
MOST_MODULES_PER_FOLDER = 15


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the rooms of `folder` under the contracts of its pyproject.toml."""
    command = [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    """Every import statement of the rooms, those inside functions and of other packages included."""
    return grimp.build_graph(*ROOMS, include_external_packages=True, cache_dir=None)


@pytest.fixture(scope="module")
def copied_rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    for room in ROOMS:
        for path in (REPOSITORY / room).rglob("*.py"):
            copy = folder / path.relative_to(REPOSITORY)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    return folder


def test_every_contract_on_imports_is_kept() -> None:
    finished = lint_imports(REPOSITORY)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize(
    ("file", "module"),
    [
        ("archs/attention.py", "tasks.base"),
        ("archs/ops/ssd/plain.py", "archs.base"),
        ("archs/ops/ssd/plain.py", "archs.ops.selective_scan.plain"),
        ("archs/base.py", "archs.mamba"),
        ("archs/mamba.py", "archs.titans.memory"),
        ("archs/titans/lmm.py", "archs.pretrained.load"),
        ("tasks/needle.py", "archs.mamba"),
        ("tasks/base.py", "harness.config.build"),
        ("harness/record/schema.py", "archs.base"),
        ("harness/record/schema.py", "harness.measure.time"),
        ("harness/measure/time.py", "harness.config.build"),
        ("harness/run/plan.py", "archs.decoder"),
        ("harness/train/loop.py", "tasks.needle"),
        ("harness/config/build.py", "harness.run.plan"),
        ("harness/run/worker.py", "reports.results.load"),
        ("reports/results/load.py", "torch"),
        ("reports/results/load.py", "tasks.base"),
        ("reports/results/load.py", "reports.draw.style"),
    ],
)
def test_an_import_past_a_door_breaks_a_contract(copied_rooms: Path, file: str, module: str) -> None:
    path = copied_rooms / file
    source = path.read_text(encoding="utf-8")
    path.write_text(f"{source}\n\ndef late() -> None:\n    import {module}\n", encoding="utf-8")
    try:
        finished = lint_imports(copied_rooms)
    finally:
        path.write_text(source, encoding="utf-8")
    importer = file.removesuffix(".py").replace("/", ".")
    assert finished.returncode == 1
    assert f"{importer} -> {module}" in " ".join(finished.stdout.split())


def test_no_module_imports_itself_by_way_of_others(graph: grimp.ImportGraph) -> None:
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    list(graphlib.TopologicalSorter(imports).static_order())  # raises CycleError


def test_the_rooms_import_no_tests(graph: grimp.ImportGraph) -> None:
    assert "tests" not in graph.modules


def test_the_record_schema_uses_the_standard_library_alone(graph: grimp.ImportGraph) -> None:
    used = graph.find_upstream_modules("harness.record.schema")
    own = {module for module in used if module.startswith("harness.record.")}
    assert own and {module.partition(".")[0] for module in used - own} <= sys.stdlib_module_names


def _folders() -> Iterator[Path]:
    for room in ROOMS:
        yield REPOSITORY / room
        yield from (path for path in (REPOSITORY / room).rglob("*") if path.is_dir())


def test_no_folder_holds_more_than_fifteen_modules() -> None:
    sizes = {
        str(folder.relative_to(REPOSITORY)): len([p for p in folder.glob("*.py") if p.name != "__init__.py"])
        for folder in _folders()
    }
    assert max(sizes.values()) <= MOST_MODULES_PER_FOLDER, sizes


def test_conf_holds_no_python() -> None:
    assert not list((REPOSITORY / "conf").rglob("*.py"))


@pytest.mark.parametrize(
    "modules",
    [
        "reports.page.html, reports.page.terminal, reports.regression.compare, reports.regression.baseline",
        "harness.run.supervision, harness.run.plan, harness.run.progress, harness.__main__",
        "harness.record.schema",
    ],
)
def test_torch_is_not_imported_by(modules: str) -> None:
    """The parent of the jobs stays small, and a report is rendered where there is no torch."""
    program = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    finished = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
