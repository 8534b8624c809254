"""Who may import whom, read from the import statements."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
ROOMS = ("archs", "tasks", "harness", "reports")
STANDARD_LIBRARY = sys.stdlib_module_names

#: What each room may import of the others; a concrete class is reached through Hydra's _target_.
ALLOWED = {
    "archs": set(),
    "tasks": {
        "archs.base",
        "archs.decode_graph",
        "harness.record.metrics",
        "harness.record.schema",
        "harness.measure.memory",
        "harness.record.outcomes",
        "harness.measure.statistics",
        "harness.measure.time",
    },
    "harness": {
        "archs.base",
        "archs.implementations",
        "tasks.base",
        *(f"archs.transformer_squared.{name}" for name in ("dispatch_training", "policies", "training")),
    },
    "reports": {
        "harness.record.metrics",
        "harness.record.metrics_of_version_1",
        "harness.record.schema",
        "harness.measure.statistics",
    },
}
#: The command line renders its report at the end.
EXCEPTIONS = {("harness/__main__.py", "reports.page.html"), ("harness/__main__.py", "reports.page.terminal")}

FILES = [path for room in ROOMS for path in sorted((REPOSITORY / room).rglob("*.py"))]


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names in an import statement, relative ones made absolute."""
    package = path.relative_to(REPOSITORY).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield module
            if module in ROOMS:  # from harness import record
                yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(REPOSITORY)) for path in FILES])
def test_a_file_imports_only_through_the_doors(path: Path) -> None:
    name = path.relative_to(REPOSITORY).as_posix()
    room = name.partition("/")[0]
    for module in imports(path):
        other = module.partition(".")[0]
        if other not in ROOMS or other == room or module in ROOMS or (name, module) in EXCEPTIONS:
            continue
        assert module in ALLOWED[room], f"{name} imports {module}"


def test_the_scan_sees_imports(tmp_path: Path) -> None:
    path = REPOSITORY / "harness" / "__main__.py"
    assert {"hydra", "harness.run.progress", "reports.page.html"} <= set(imports(path))


def test_the_rooms_import_no_tests_and_the_record_only_the_standard_library() -> None:
    for path in FILES:
        assert not any(module.partition(".")[0] == "tests" for module in imports(path)), path
    record = REPOSITORY / "harness" / "record" / "schema.py"
    assert all(m.partition(".")[0] in STANDARD_LIBRARY for m in imports(record))


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
