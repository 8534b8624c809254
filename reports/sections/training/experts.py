"""The table of experts that an adaptive architecture (Transformer²) was given after its training."""

from __future__ import annotations

from collections.abc import Mapping

from reports.draw.numbers import MISSING, fixed, integer, percent
from reports.draw.table import Cell, Column, Table, name_cell
from reports.results.load import Results, is_number
from reports.sections.quality.loss import HINT


def experts_table(results: Results) -> Table | None:
    """Return one row per expert and seed; None where no training has experts. A dash: not recorded."""
    rows = []
    for series in results.series:
        for point in results.samples(series, "train"):
            experts = point.details.get("experts")
            if not isinstance(experts, Mapping):
                continue
            accuracy = _number(point.details, "classifier_accuracy")
            for domain, expert in experts.items():
                before, after, step = (
                    _number(expert, name) for name in ("reward_before", "reward_after", "best_step")
                )
                gain = None if before is None or after is None else after - before
                rows.append(
                    [
                        name_cell(series),
                        Cell(text=integer(point.seed)),
                        Cell(text=str(domain)),
                        Cell(text=fixed(before, 3)),
                        Cell(text=fixed(after, 3)),
                        Cell(text=MISSING if gain is None else f"{gain:+.3f}"),
                        Cell(text=integer(step), note="the base is kept" if step == 0 else ""),
                        Cell(text=percent(accuracy)),
                    ]
                )
    if not rows:
        return None
    return Table(
        name="experts",
        caption="Experts by domain: the expected reward (-1 to 1) of the base and of the kept expert, on the "
        "validation batches that the expert was chosen on, and the step it was kept at. The classifier’s "
        f"accuracy is its share of right domains on validation prompts. {HINT}",
        columns=[
            Column(title="Architecture", is_numeric=False),
            Column(title="Seed"),
            Column(title="Domain", is_numeric=False),
            Column(title="Before", unit="expected reward"),
            Column(title="After", unit="expected reward"),
            Column(title="Gain"),
            Column(title="Kept", unit="step"),
            Column(title="Classifier", unit="accuracy"),
        ],
        rows=rows,
    )


def _number(values: object, name: str) -> float | None:
    value = values.get(name) if isinstance(values, Mapping) else None
    return value if is_number(value) else None
