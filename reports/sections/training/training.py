"""Training runs: what each was and reached."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from reports.draw.curves import Line, distinct, names_of, plot
from reports.draw.numbers import MISSING, fixed, integer, rate_text, significant
from reports.draw.style import Picture, drawing, legend, new_figure, save
from reports.draw.table import Cell, Column, Table, name_cell, number_cell, spread
from reports.results.load import Results, is_number
from reports.results.queries import lookup, status_of

#: The training loss is drawn as a running median over this share of the run.
SMOOTHING_SHARE = 0.05


MAX_DRAWN_POINTS = 400


def training_figures(results: Results, output: Path) -> list[Picture]:
    """The training loss (smoothed) and the validation loss against the step; those that exist."""
    pictures = []
    for name, x_key, y_key, title in (
        ("training_loss", "step", "loss_nats", "Training loss"),
        ("validation_loss", "validation_step", "validation_loss_nats", "Validation loss"),
    ):
        is_noisy = name == "training_loss"
        lines = _lines(results, x_key, y_key, is_noisy)
        smoothing = ", a running median over 5% of the run" if is_noisy else ""
        weights = (
            " Answers and the text around needles count with the weights of conf/train, and the mixture "
            "changes with the stage, which moves the loss too."
            if is_noisy
            else " Of text alone."
        )
        if not lines:
            continue
        with drawing():
            figure, axes = new_figure()
            for line in lines:
                plot(axes, line, has_markers=not is_noisy)
            axes.set_xlabel("step")
            axes.set_ylabel("nats a token")
            legend(figure, distinct(lines))
            pictures.append(
                save(
                    figure,
                    output,
                    name=name,
                    title=title,
                    caption=f"{title} in nats a token against the step{smoothing}; one line a seed.{weights}",
                    alternative_text=f"{title} against step, a line each for {names_of(lines)}.",
                )
            )
    return pictures


def _lines(results: Results, x_key: str, y_key: str, is_noisy: bool) -> list[Line]:
    """Curves of failed runs are drawn too, as far as they went."""
    lines = []
    for series in results.series:
        for point in results.of("train"):
            if (point.arch, point.size) != series.key:
                continue
            pairs = zip(point.samples.get(x_key) or [], point.samples.get(y_key) or [], strict=False)
            known = [(float(x), float(y)) for x, y in pairs if is_number(x) and is_number(y)]
            if known:
                x, y = zip(*known, strict=True)
                lines.append(_smooth(Line(series=series, x=list(x), y=list(y)), is_noisy))
    return lines


def _smooth(line: Line, is_noisy: bool) -> Line:
    if not is_noisy:
        return line
    half = int(len(line.y) * SMOOTHING_SHARE / 2)
    y = [median(line.y[max(0, i - half) : i + half + 1]) for i in range(len(line.y))]
    stride = max(1, len(y) // MAX_DRAWN_POINTS)
    return Line(series=line.series, x=line.x[::stride], y=y[::stride])


def training_table(results: Results) -> Table:
    """What each training run was and reached; skipped steps have a column where there were any."""
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
    """3, or 2.5 where it is a mean."""
    return MISSING if value is None else f"{value:.3g}"


def implementations_text(implementations: object) -> str:
    """ "attention: plain, scan: plain" """
    if not isinstance(implementations, dict) or not implementations:
        return MISSING
    return ", ".join(f"{operation}: {name}" for operation, name in implementations.items())
