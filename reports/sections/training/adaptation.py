"""What adapting to a domain gained: experts, LoRA and the strategies of the first pass, prompt by prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from harness.measure.statistics import two_level_ratio, wilson_interval_over_seeds
from harness.record.schema import Point
from reports.draw.numbers import MISSING, integer, percent, significant
from reports.draw.table import Cell, Column, Table, failed_cell, name_cell
from reports.results.load import Results, is_number
from reports.results.series import Series
from reports.sections.base import Section, fold

#: How an adaptation is called, in the order of the table.
NAMES = {
    "base": "base",
    "expert": "expert of the domain",
    "lora": "LoRA of the domain",
    "prompt": "dispatch: prompt",
    "classification_expert": "dispatch: classification expert",
    "classifier": "dispatch: classifier",
    "few_shot": "dispatch: few-shot mixture",
}
#: What a gain is over, each with its name.
RIVALS = {"base": "base", "lora": "LoRA"}

#: Seed -> one value a prompt, None where there is none.
Values = Mapping[int, Sequence[float | None]]


def section(results: Results) -> Section | None:
    """Return the section; None where no architecture was given experts."""
    if not has_experts(results):
        return None
    gains = adaptation_table(results)
    notes = [] if gains else ["Gains over the base and over LoRA were not measured in these records."]
    return Section(
        anchor="adaptation",
        title="Adaptation to a domain",
        notes=notes,
        tables=[table for table in (gains, tuning_table(results)) if table],
        folded=fold("Few-shot mixtures", mixtures_table(results)),
    )


def has_experts(results: Results) -> bool:
    """Whether any architecture was given experts, measured or not."""
    trained = any(isinstance(p.details.get("experts"), Mapping) for p in results.ok("train"))
    return trained or bool(results.of("adaptation"))


def adaptation_table(results: Results) -> Table | None:
    """One row an architecture, domain and adaptation, seeds pooled; None where none was measured."""
    rows, placements, has_seeds = [], dict[str, None](), False
    for series in results.series:
        points = [point for point in results.of("adaptation") if (point.arch, point.size) == series.key]
        domains = dict.fromkeys(str(point.cell.get("domain")) for point in points)
        for domain in domains:
            own = [point for point in points if point.cell.get("domain") == domain]
            rows += _rows(series, domain, own)
        trained = results.samples(series, "train") if points else []
        placements |= dict.fromkeys(
            str(p.details["lora_placement"]) for p in trained if "lora_placement" in p.details
        )
        has_seeds |= len({point.seed for point in points if point.status == "ok"}) > 1
    if not rows:
        return None
    notes = [f" {placement}." for placement in placements]
    if has_seeds:
        notes.append(
            " The prompts of all seeds are pooled; the intervals allow for the differences between models of "
            "different seeds."
        )
    return Table(
        name="adaptation",
        caption="Held-out prompts of each domain. Greedy is the share of answers that greedy decoding gives "
        "exactly, with Wilson’s 95% interval; sampled is the mean probability of the right answer, which is "
        "what sampling at temperature 1 gets right and REINFORCE rewards. Gains are differences prompt by "
        "prompt with their 95% bootstrap interval over prompts, in points of a percent; where the interval "
        "holds 0, these prompts do not tell the two apart. Parameters are all that the adaptation uses: of "
        "one expert or adapter, or of all experts and what dispatches them. The first pass chooses the "
        "experts for one prompt, the second reads it and decodes the answer. All times, those of the base "
        "and of LoRA too, are of the model whose feed-forward matrices are factored for the experts, which "
        "base and LoRA do not need: the plain base’s times stand in the latency table. The question that "
        "the strategies “prompt” and “classification expert” append to a prompt occurs in no training text "
        "of a base that is trained here, and with the default training it reaches past the trained length."
        + "".join(notes),
        columns=[
            Column(title="Architecture", is_numeric=False),
            Column(title="Domain", is_numeric=False),
            Column(title="Adaptation", is_numeric=False),
            Column(title="Greedy", unit="exact match [95%]"),
            *(Column(title=f"Gain over {name}", unit="greedy, points [95%]") for name in RIVALS.values()),
            Column(title="Sampled", unit="probability of the answer"),
            *(Column(title=f"Gain over {name}", unit="sampled, points [95%]") for name in RIVALS.values()),
            Column(title="Tuned", unit="parameters"),
            Column(title="Right expert", unit="weight"),
            Column(title="First pass", unit="ms"),
            Column(title="Second pass", unit="ms"),
        ],
        rows=rows,
    )


def _rows(series: Series, domain: str, points: list[Point]) -> list[list[Cell]]:
    by_name: dict[str, list[Point]] = {}
    for point in points:
        by_name.setdefault(str(point.cell.get("adaptation")), []).append(point)
    rivals = {name: by_name.get(name, []) for name in RIVALS}
    rows = []
    for name in sorted(by_name, key=lambda n: list(NAMES).index(n) if n in NAMES else len(NAMES)):
        own = by_name[name]
        exact, sampled = _exact(own), _sampled(own)
        status = next((point.status for point in own if point.status != "ok"), None)
        cells = [name_cell(series), Cell(text=domain), Cell(text=NAMES.get(name, name))]
        for values, of in ((exact, _exact), (sampled, _sampled)):
            cells.append(_share(values, status, is_count=of is _exact))
            cells += [_gain(values, of(others), is_same=rival == name) for rival, others in rivals.items()]
        cells += [
            Cell(text=integer(_mean(own, "num_tuned_parameters"))),
            Cell(text=percent(_mean(own, "right_domain_share"))),
            Cell(text=significant(_mean(own, "first_pass_ms"))),
            Cell(text=significant(_mean(own, "second_pass_ms"))),
        ]
        rows.append(cells)
    return rows


def _exact(points: list[Point]) -> Values:
    """Seed -> 1 or 0 a prompt."""
    return {p.seed: _numbers(p, "is_correct") for p in points if p.status == "ok"}


def _sampled(points: list[Point]) -> Values:
    """Seed -> the probability of the right answer, one a prompt."""
    return {
        p.seed: [
            None if value is None else math.exp(value) for value in _numbers(p, "answer_log_probability_nats")
        ]
        for p in points
        if p.status == "ok"
    }


def _numbers(point: Point, name: str) -> list[float | None]:
    """One entry a prompt, None where there is no number: its place is what pairs it with a rival's."""
    values = point.samples.get(name)
    if not isinstance(values, list):
        return []
    return [float(value) if is_number(value) else None for value in values]


def _share(values: Values, status: str | None, *, is_count: bool) -> Cell:
    """Return the mean over all prompts of all seeds; of ones and zeros with its Wilson interval."""
    seeds = [[value for value in numbers if value is not None] for numbers in values.values()]
    seeds = [numbers for numbers in seeds if numbers]
    if not seeds:
        return failed_cell(status)
    num_prompts = sum(map(len, seeds))
    note = ""
    if is_count:
        low, high = wilson_interval_over_seeds([round(sum(n)) for n in seeds], [len(n) for n in seeds])
        note = f"[{100 * low:.1f}%, {100 * high:.1f}%] of {num_prompts:,}"
    return Cell(text=f"{100 * sum(map(sum, seeds)) / num_prompts:.1f}%", note=note)


def _gain(values: Values, others: Values, *, is_same: bool) -> Cell:
    """Return the mean difference on the prompts of the seeds that both have; a dash for a rival over
    itself."""
    pairs = [
        [
            own - other
            for own, other in zip(numbers, others[seed], strict=True)
            if own is not None and other is not None
        ]
        for seed, numbers in values.items()
        if len(numbers) == len(others.get(seed, ()))
    ]
    gaps = [numbers for numbers in pairs if numbers]
    if is_same or not gaps:
        return Cell(text=MISSING)
    gain, low, high = two_level_ratio(gaps, [[1.0] * len(numbers) for numbers in gaps])
    note = "" if low is None or high is None else f"[{100 * low:+.2f}, {100 * high:+.2f}]"
    return Cell(text=f"{100 * gain:+.2f}", note=note)


def _mean(points: list[Point], name: str) -> float | None:
    values = [p.metrics.get(name) for p in points if p.status == "ok"]
    known = [float(value) for value in values if value is not None and is_number(value)]
    return sum(known) / len(known) if known else None


def tuning_table(results: Results) -> Table | None:
    """What was trained beside the base, how and in what time; None where no record says."""
    rows = []
    for series in results.series:
        for point in results.samples(series, "train"):
            if not isinstance(point.details.get("experts"), Mapping):
                continue
            details, metrics = point.details, point.metrics
            for title, parameters, seconds, method, kept in (
                ("experts", "num_expert_parameters", "expert_train_seconds", "expert_method", ""),
                ("LoRA", "num_lora_parameters", "lora_train_seconds", "lora_method", "lora_placement"),
            ):
                rows.append(
                    [
                        name_cell(series),
                        Cell(text=integer(point.seed)),
                        Cell(text=title),
                        Cell(text=str(details.get(method) or MISSING).replace("_", "-")),
                        Cell(text=integer(_number(metrics, parameters))),
                        Cell(text=significant(_number(metrics, seconds))),
                        Cell(text=str(details.get(kept) or "")),
                    ]
                )
    if not rows:
        return None
    return Table(
        name="tuning",
        caption="What was tuned for each domain, on the same prompts and for the same number of steps. The "
        "experts’ time holds that of the first pass’s training and of the few-shot search.",
        columns=[
            Column(title="Architecture", is_numeric=False),
            Column(title="Seed"),
            Column(title="Tuned", is_numeric=False),
            Column(title="Method", is_numeric=False),
            Column(title="Parameters", unit="a domain"),
            Column(title="Time", unit="s, all domains"),
            Column(title="Where", is_numeric=False),
        ],
        rows=rows,
    )


def mixtures_table(results: Results) -> Table | None:
    """The few-shot mixtures that were found; None where none was searched."""
    rows = []
    for series in results.series:
        for point in results.samples(series, "train"):
            found = point.details.get("few_shot")
            for domain, entry in found.items() if isinstance(found, Mapping) else ():
                mixture = entry.get("mixture") if isinstance(entry, Mapping) else None
                if isinstance(mixture, Mapping):
                    weights = ", ".join(f"{name} {value:.2f}" for name, value in mixture.items())
                    cells = [Cell(text=str(domain)), Cell(text=weights)]
                    seconds = Cell(text=significant(_number(entry, "seconds")))
                    rows.append([name_cell(series), Cell(text=integer(point.seed)), *cells, seconds])
    if not rows:
        return None
    return Table(
        name="mixtures",
        caption="Mixtures that the cross-entropy method found on a few examples of each domain; what the "
        "weights leave of 1 goes to the base.",
        columns=[
            Column(title="Architecture", is_numeric=False),
            Column(title="Seed"),
            Column(title="Examples of", is_numeric=False),
            Column(title="Weights of the experts", is_numeric=False),
            Column(title="Search", unit="s"),
        ],
        rows=rows,
    )


def _number(values: Mapping[str, object], name: str) -> float | None:
    value = values.get(name)
    return value if is_number(value) else None
