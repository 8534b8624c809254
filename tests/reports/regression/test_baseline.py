"""What `make regress` measures and what it compares with. tests/reports covers the comparison itself."""

from __future__ import annotations

from pathlib import Path

from harness.config.compose import compose_config
from reports.regression.baseline import read_baseline

REPOSITORY = Path(__file__).resolve().parent.parent.parent.parent


def test_the_regression_sweep_reads_a_text_of_the_projects_own_on_one_cpu_thread() -> None:
    config = compose_config(["experiment=regress"])
    assert (config.device, config.num_threads) == ("cpu", 1)
    assert (REPOSITORY / config.data.path).is_dir()


def test_the_baseline_holds_every_architecture_of_the_sweep() -> None:
    baseline = read_baseline(REPOSITORY / "tests" / "baselines" / "smoke.json")
    config = compose_config(["experiment=regress"])
    swept = {f"{name} {config.size.name} seed {config.seed}" for name in config.archs}
    assert set(baseline.entries) == swept
    for entry in baseline.entries.values():
        assert entry.exact and entry.quality and entry.time
        assert set(entry.cells.values()) == {"ok"}
