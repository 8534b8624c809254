"""Where the numbers come from: experiments, commands, machines, and warnings about comparing them."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from reports.draw.numbers import MISSING, bytes_text, joined, number_text
from reports.draw.table import Cell, Column, Table
from reports.results.load import Results, is_number
from reports.sections.base import Folded, Section

#: Environment entries that decide times; if they differ, times are not comparable.
MACHINE_KEYS = ("cpu_name", "num_cpus", "gpu_name", "driver", "cuda", "torch", "platform")


TITLES = {
    "cpu_name": "CPU",
    "num_cpus": "CPU cores",
    "gpu_name": "GPU",
    "cuda": "CUDA",
    "python": "Python",
    "torch": "PyTorch",
    "cudnn": "cuDNN",
    "gpu_memory_bytes": "GPU memory",
    "is_dirty": "Uncommitted changes",
}


def section(results: Results) -> Section:
    """Return the section on machines, software and commands."""
    return Section(
        anchor="run",
        title="What was run on what",
        tables=[environment_table(results)],
        texts=[("The command", "\n".join(commands(results)))],
    )


def configuration_section(results: Results) -> Section:
    """Return the section on the configurations: one entry per run, by job name and then by time."""
    return Section(
        anchor="config",
        title="Configuration of every run",
        folded=[
            Folded(
                title=header.job,
                note=f"Started {header.started_at}, configuration {header.config_hash}, "
                f"data {header.data_hash or MISSING}",
                texts=[header.command, json.dumps(header.config, indent=2, ensure_ascii=False)],
            )
            for header in sorted(results.headers, key=lambda header: header.job)
        ],
    )


def experiment_names(results: Results) -> str:
    """Return the experiments' names; the folders' where the records name none."""
    names = list(dict.fromkeys(header.experiment for header in results.headers if header.experiment))
    return joined(names or [folder.resolve().name for folder in results.folders])


def commands(results: Results) -> list[str]:
    """Return the distinct commands of the shown runs, oldest first."""
    return list(dict.fromkeys(header.command for header in results.headers if header.command))


def environment_table(results: Results) -> Table:
    """Return every recorded fact; where runs differ, each value with its number of runs."""
    keys = [
        key for header in results.headers for key, value in header.environment.items() if value is not None
    ]
    keys = list(dict.fromkeys(["cpu_name", "gpu_name", *keys]))
    rows = []
    for key in keys:
        counts = Counter(_fact(header.environment.get(key), key) for header in results.headers)
        values = [
            value if len(counts) == 1 else f"{value} ({count} runs)" for value, count in counts.most_common()
        ]
        rows.append([Cell(text=_title(key)), Cell(text="; ".join(values))])
    hashes = Counter(header.data_hash for header in results.headers if header.data_hash)
    for point in results.ok("calibration"):
        for metric in results.metrics("calibration"):
            text = f"{number_text(point.metrics.get(metric.name), metric.unit)} {metric.unit}"
            rows.append([Cell(text=f"Calibration, {metric.label}"), Cell(text=text)])
    rows.append([Cell(text="Data"), Cell(text="; ".join(hashes) or MISSING)])
    return Table(
        name="environment",
        caption="The machine and software of the runs shown, as recorded by each run.",
        columns=[Column(title="Fact", is_numeric=False), Column(title="Value", is_numeric=False)],
        rows=rows,
    )


def _title(key: str) -> str:
    return TITLES.get(key, key.removesuffix("_bytes").replace("_", " ").capitalize())


def _fact(value: Any, key: str = "") -> str:
    if value is None:
        return "none" if key == "gpu_name" else MISSING
    if key.endswith("_bytes") and is_number(value):
        return bytes_text(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_fact(item)}" for key, item in value.items())
    return str(value)


def num_machines(results: Results) -> int:
    """Return how many different machines or versions of torch the runs with times come from."""
    timed = {p.run_id for p in results.points if any(_is_time(name) for name in p.metrics)}
    facts = [header.environment for header in results.headers if header.run_id in timed]
    return len({tuple(_fact(fact.get(key)) for key in MACHINE_KEYS) for fact in facts})


def _is_time(metric: str) -> bool:
    return metric.endswith(("_ms", "_seconds", "_per_s"))


def warnings(results: Results) -> list[str]:
    """Return what a reader must know before comparing anything."""
    found = []
    if results.damaged_lines:
        found.append(
            f"Record lines that could not be read and are not in this report: {len(results.damaged_lines)}; "
            "see “What did not work”."
        )
    if results.left_out:
        total = sum(results.left_out.values())
        which = "; ".join(f"{name}: {count}" for name, count in results.left_out.items())
        found.append(
            f"{total} measurements of other configurations were left out, the newest configuration of each "
            f"job is shown ({which})."
        )
    if results.num_superseded:
        found.append(
            f"{results.num_superseded} older measurements of the same cells were replaced by newer runs."
        )
    if (count := num_machines(results)) > 1:
        found.append(f"The runs come from {count} different machines or versions: compare times with care.")
    if (num_workers := max((h.config.get("num_workers", 1) for h in results.headers), default=1)) > 1:
        found.append(
            f"Up to {num_workers} models trained and were tested at once: training speeds, and the times of "
            "Transformer²'s two passes, were measured beside other work. Latency was measured alone."
        )
    if any(header.environment.get("is_dirty") for header in results.headers):
        found.append("Some runs were made from a working tree with uncommitted changes.")
    return found
