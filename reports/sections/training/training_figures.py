"""Training curves and the learning-rate search."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from reports.draw.curves import Line, names_of, plot
from reports.draw.style import Picture, drawing, legend, log_axis, new_figure, save
from reports.results.load import Results, is_number

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
            legend(figure, _distinct(lines))
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


def _distinct(lines: list[Line]) -> list:
    return list({line.series.key: line.series for line in lines}.values())


def learning_rate_figure(results: Results, output: Path) -> Picture | None:
    """Held-out loss of the runs of the search against the learning rate."""
    frame = results.table("learning_rate_search")
    if "mixture_loss_nats" not in frame:
        return None
    lines = []
    for series in results.series:
        own = frame[(frame["arch"] == series.arch) & (frame["size"] == series.size)]
        own = own.dropna(subset=["mixture_loss_nats"]).sort_values("learning_rate")
        if len(own):
            lines.append(
                Line(series=series, x=own["learning_rate"].tolist(), y=own["mixture_loss_nats"].tolist())
            )
    with drawing():
        figure, axes = new_figure()
        for line in lines:
            plot(axes, line)
        log_axis(axes, "learning rate", "x")
        axes.set_ylabel("held-out loss (nats, as weighted)")
        legend(figure, _distinct(lines))
        return save(
            figure,
            output,
            name="learning_rate_search",
            title="Learning-rate search",
            caption="Loss on held-out batches of the mixture that was trained on, text and needle contexts "
            "with their weights, after training at each learning rate (log axis).",
            alternative_text=f"Held-out loss against learning rate, a line each for {names_of(lines)}.",
        )
