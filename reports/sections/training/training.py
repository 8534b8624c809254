"""Training runs: their settings, losses and speed."""

from __future__ import annotations

from statistics import median
from typing import Literal

from reports.draw.numbers import MISSING, fixed, integer, rate_text, significant
from reports.draw.plot import Axis, Curve, Plot
from reports.draw.table import Cell, Column, Table, name_cell, number_cell, spread
from reports.results.load import Results, is_number
from reports.results.queries import lookup, status_of
from reports.sections.base import Section
from reports.sections.training.experts import experts_table

#: The training loss is drawn as a running median over this share of the run.
SMOOTHING_SHARE = 0.05
MAX_DRAWN_POINTS = 400


def section(results: Results) -> Section:
    """Return the section; it says so where nothing was trained."""
    if not results.of("train"):
        return Section(anchor="training", title="Training", notes=["Nothing was trained."])
    figures = (training_loss(results), validation_loss(results))
    tables = (training_table(results), experts_table(results))
    return Section(
        anchor="training",
        title="Training",
        figures=[figure for figure in figures if figure],
        tables=[table for table in tables if table],
    )


def training_loss(results: Results) -> Plot | None:
    """Prepare the smoothed training loss against the step; None where none was recorded."""
    curves = [_smooth(curve) for curve in _curves(results, "step", "loss_nats")]
    return _loss_plot(
        curves,
        name="training_loss",
        title="Training loss",
        caption="Training loss in nats per token against the step, a running median over 5% of the run; one "
        "line per seed. Answers and the text around needles count with the weights of conf/train, and the "
        "mixture changes with the stage, which moves the loss too.",
        style="lines",
    )


def validation_loss(results: Results) -> Plot | None:
    """Prepare the validation loss against the step; None where none was recorded."""
    return _loss_plot(
        _curves(results, "validation_step", "validation_loss_nats"),
        name="validation_loss",
        title="Validation loss",
        caption="Validation loss in nats per token against the step; one line per seed. Of text alone.",
        style="lines with markers",
    )


def _loss_plot(
    curves: list[Curve],
    *,
    name: str,
    title: str,
    caption: str,
    style: Literal["lines", "lines with markers"],
) -> Plot | None:
    if not curves:
        return None
    return Plot(
        name=name,
        title=title,
        caption=caption,
        x=Axis(label="step"),
        y=Axis(label="nats per token"),
        curves=curves,
        style=style,
    )


def _curves(results: Results, x_key: str, y_key: str) -> list[Curve]:
    """Return one curve per run; those of failed runs go as far as the run went."""
    curves = []
    for series in results.series:
        for point in results.of("train", series):
            pairs = zip(point.samples.get(x_key) or [], point.samples.get(y_key) or [], strict=False)
            known = [(float(x), float(y)) for x, y in pairs if is_number(x) and is_number(y)]
            if known:
                x, y = zip(*known, strict=True)
                curves.append(Curve(series=series, x=list(x), y=list(y)))
    return curves


def _smooth(curve: Curve) -> Curve:
    """Return the running median over SMOOTHING_SHARE of the run, thinned to about MAX_DRAWN_POINTS."""
    half = int(len(curve.y) * SMOOTHING_SHARE / 2)
    y = [median(curve.y[max(0, i - half) : i + half + 1]) for i in range(len(curve.y))]
    stride = max(1, len(y) // MAX_DRAWN_POINTS)
    return Curve(series=curve.series, x=curve.x[::stride], y=y[::stride])


def training_table(results: Results) -> Table:
    """Return the settings and results of each training; skipped steps have a column if there were any."""
    frame = results.table("train")
    has_skipped = any((p.metrics.get("num_skipped_steps") or 0) > 0 for p in results.ok("train"))
    rows = []
    for series in results.series:
        status = status_of(results, series, "train")
        numbers = {
            name: lookup(frame, series, name)
            for name in (
                *("num_parameters", "trained_tokens", "train_seconds", "tokens_per_s", "learning_rate"),
                *("final_validation_bits_per_byte", "final_validation_bits_per_byte_sd", "num_seeds"),
                "num_skipped_steps",
            )
        }
        details = next((point.details for point in results.samples(series, "train")), {})
        mismatch = details.get("parameter_mismatch")
        bits = numbers["final_validation_bits_per_byte"]
        rows.append(
            [
                name_cell(series),
                number_cell(
                    numbers["num_parameters"],
                    integer(numbers["num_parameters"]),
                    note=f"{100 * mismatch:+.1f}% against the target" if is_number(mismatch) else "",
                ),
                number_cell(numbers["trained_tokens"], integer(numbers["trained_tokens"]), status),
                Cell(text=significant(numbers["train_seconds"])),
                Cell(text=integer(numbers["tokens_per_s"])),
                Cell(text=rate_text(numbers["learning_rate"])),
                number_cell(
                    bits, fixed(bits, 3), status, spread(numbers["final_validation_bits_per_byte_sd"]).strip()
                ),
                *([Cell(text=count_text(numbers["num_skipped_steps"]))] if has_skipped else []),
                Cell(text=integer(numbers["num_seeds"])),
                Cell(
                    text=", ".join(str(details[k]) for k in ("dtype", "device") if details.get(k)) or MISSING
                ),
                Cell(text=implementations_text(details.get("implementations"))),
            ]
        )
    return Table(
        name="training",
        caption="What each architecture was trained with and reached; means where there are several seeds."
        + (" Skipped are steps whose loss or gradient was not finite." if has_skipped else ""),
        columns=[
            Column(title="Architecture", is_numeric=False),
            Column(title="Parameters"),
            Column(title="Trained", unit="tokens"),
            Column(title="Time", unit="s"),
            Column(title="Speed", unit="tokens/s"),
            Column(title="Learning rate"),
            Column(title="Validation", unit="bits per byte"),
            *([Column(title="Skipped", unit="steps")] if has_skipped else []),
            Column(title="Seeds"),
            Column(title="Precision, device", is_numeric=False),
            Column(title="Implementations", is_numeric=False),
        ],
        rows=rows,
    )


def count_text(value: float | None) -> str:
    """Return "3", or "2.5" where it is a mean."""
    return MISSING if value is None else f"{value:.3g}"


def implementations_text(implementations: object) -> str:
    """Return "attention: plain, scan: plain"."""
    if not isinstance(implementations, dict) or not implementations:
        return MISSING
    return ", ".join(f"{operation}: {name}" for operation, name in implementations.items())
