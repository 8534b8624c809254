"""Tables about quality and training: perplexity by context, needle by context, training runs."""

from __future__ import annotations

from reports.draw.numbers import MISSING, fixed, integer, rate_text, significant
from reports.draw.table import (
    Cell,
    Column,
    Table,
    interval_text,
    name_cell,
    number_cell,
    pooled_cell,
    spread,
)
from reports.results.load import Results, is_number
from reports.results.ranking import lookup
from reports.results.series import Series
from reports.results.statistics import pool


def contexts_of(results: Results, task: str) -> list[float]:
    """All context lengths that were tried for a task, in order."""
    found = {point.cell.get("context_tokens") for point in results.of(task)}
    return sorted(float(value) for value in found if is_number(value))


def trained_contexts(results: Results) -> set[float]:
    """The needle contexts that lie among the trained lengths."""
    points = [point for point in results.ok("needle") if point.metrics.get("is_trained_length")]
    return {float(p.cell["context_tokens"]) for p in points if is_number(p.cell.get("context_tokens"))}


def longest_trained(results: Results) -> float | None:
    """The longest length that any architecture was trained on, in tokens; None if not recorded."""
    lengths = [
        float(value)
        for point in results.ok("train")
        for value in point.details.get("trained_lengths_tokens") or []
        if is_number(value)
    ]
    return max([*lengths, *trained_contexts(results)], default=None)


def chance_accuracy(results: Results) -> float | None:
    """The needle's chance level, None if not recorded."""
    chances = [p.metrics.get("chance_accuracy") for p in results.ok("needle")]
    return max((float(value) for value in chances if value is not None and is_number(value)), default=None)


def _status(results: Results, series: Series, task: str, context: float | None = None) -> str | None:
    """Why a cell has no number: its own failure, else the training's."""
    for wanted in (task, "train"):
        for point in results.failures():
            is_here = context is None or point.cell.get("context_tokens") in (context, None)
            if (point.arch, point.size, point.task) == (*series.key, wanted) and is_here:
                return point.status
    return None


def perplexity_table(results: Results) -> Table:
    """Bits per byte, its interval and perplexity at every context length."""
    frame = results.table("perplexity")
    contexts = contexts_of(results, "perplexity")
    rows = []
    for series in results.series:
        cells = [name_cell(series)]
        for context in contexts:
            value, low, high, sd, perplexity = (
                lookup(frame, series, name, context_tokens=context)
                for name in (
                    "bits_per_byte",
                    "bits_per_byte_low",
                    "bits_per_byte_high",
                    "bits_per_byte_sd",
                    "perplexity",
                )
            )
            note = interval_text(low, high, 3) + spread(sd) + f" ppl {significant(perplexity)}"
            cells.append(
                number_cell(value, fixed(value, 3), _status(results, series, "perplexity", context), note)
            )
        rows.append(cells)
    counts = _sample_counts(results)
    return Table(
        name="perplexity",
        caption="Bits per byte on test documents with that many tokens of context, the 95% bootstrap "
        f"interval over documents, and perplexity a token. {counts}".strip(),
        columns=[
            Column(title="Architecture", is_numeric=False),
            *(Column(title=integer(context), unit="tokens of context") for context in contexts),
        ],
        rows=rows,
    )


def _sample_counts(results: Results) -> str:
    documents = [p.metrics.get("num_documents") for p in results.ok("perplexity")]
    tokens = [p.metrics.get("num_tokens") for p in results.ok("perplexity")]
    parts = []
    for values, word in ((documents, "documents"), (tokens, "tokens")):
        known = sorted({int(value) for value in values if is_number(value)})
        if known:
            ends = dict.fromkeys(integer(value) for value in (known[0], known[-1]))
            parts.append(f"{' to '.join(ends)} {word}")
    return f"Each cell: {', '.join(parts)}." if parts else ""


def domains_table(results: Results) -> Table | None:
    """Bits per byte by domain at the longest context; None where no point has domains."""
    contexts = contexts_of(results, "perplexity")
    found: dict[tuple[str, str], tuple[dict[str, float], str]] = {}
    for point in results.ok("perplexity"):
        domains = point.details.get("domains")
        if contexts and point.cell.get("context_tokens") == contexts[-1] and isinstance(domains, dict):
            adaptation = point.details.get("adaptation")
            found[(point.arch, point.size)] = (domains, adaptation if isinstance(adaptation, str) else "")
    names = list(dict.fromkeys(name for domains, _ in found.values() for name in domains))
    if not names:
        return None
    rows = []
    for series in results.series:
        if series.key not in found:
            continue
        domains, adaptation = found[series.key]
        values = [domains.get(name) for name in names]
        cells = [Cell(text=fixed(value, 3) if is_number(value) else MISSING) for value in values]
        rows.append([name_cell(series), *cells, Cell(text=adaptation)])
    return Table(
        name="domains",
        caption=f"Bits per byte by domain at {integer(contexts[-1])} tokens of context (the last seed read).",
        columns=[
            Column(title="Architecture", is_numeric=False),
            *(Column(title=name) for name in names),
            Column(title="Adaptation", is_numeric=False),
        ],
        rows=rows,
    )


def needle_table(results: Results) -> Table:
    """Accuracy over all depths and the answer's log-probability at every context length."""
    contexts, trained = contexts_of(results, "needle"), trained_contexts(results)
    rows = []
    for series in results.series:
        points = [point for point in results.of("needle") if (point.arch, point.size) == series.key]
        cells = [name_cell(series)]
        for context in contexts:
            here = [point for point in points if point.cell.get("context_tokens") == context]
            cell = pooled_cell(pool(here), _status(results, series, "needle", context))
            nats = [p.metrics.get("answer_log_probability_nats") for p in here]
            known = [float(value) for value in nats if is_number(value)]
            if known:
                cell.note += f" log p {fixed(sum(known) / len(known), 2)}"
            cells.append(cell)
        rows.append(cells)
    chance = chance_accuracy(results)
    examples = sorted(
        {int(p.metrics["num_examples"] or 0) for p in results.ok("needle") if p.metrics.get("num_examples")}
    )
    count = (
        " to ".join(dict.fromkeys(integer(value) for value in (examples[0], examples[-1])))
        if examples
        else MISSING
    )
    return Table(
        name="needle",
        caption="Exact match over all depths with its Wilson 95% interval, and the mean log-probability of "
        f"the answer in nats. {count} examples a cell of the grid; chance is "
        f"{'not recorded' if chance is None else f'{100 * chance:.3g}%'}.",
        columns=[
            Column(title="Architecture", is_numeric=False),
            *(
                Column(title=integer(x), unit="tokens, trained" if x in trained else "tokens, beyond")
                for x in contexts
            ),
        ],
        rows=rows,
    )


def training_table(results: Results) -> Table:
    """What each training run was and reached; skipped steps have a column where there were any."""
    frame = results.table("train")
    has_skipped = any((p.metrics.get("num_skipped_steps") or 0) > 0 for p in results.ok("train"))
    rows = []
    for series in results.series:
        status = _status(results, series, "train")
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


def learning_rate_table(results: Results) -> Table | None:
    """Held-out loss at each searched rate, the picked one marked; None without a search."""
    points = results.of("learning_rate_search")
    rates = sorted({float(p.cell["learning_rate"]) for p in points if is_number(p.cell.get("learning_rate"))})
    if not rates:
        return None
    frame, train = results.table("learning_rate_search"), results.table("train")
    failed = {(p.arch, p.size, p.cell.get("learning_rate")): p.status for p in points if p.status != "ok"}
    rows = []
    for series in results.series:
        values = [lookup(frame, series, "mixture_loss_nats", learning_rate=rate) for rate in rates]
        statuses = [failed.get((*series.key, rate)) for rate in rates]
        if not any(values) and not any(statuses):
            continue
        cells = [
            number_cell(value, fixed(value, 3), status)
            for value, status in zip(values, statuses, strict=True)
        ]
        known = [value for value in values if value is not None]
        for cell, value in zip(cells, values, strict=True):
            cell.is_best = value is not None and value == min(known)
        used = lookup(train, series, "learning_rate")
        rows.append([name_cell(series), *cells, number_cell(used, rate_text(used))])
    return Table(
        name="learning_rates",
        caption="Loss on held-out batches of the mixture that is trained on (text and needle contexts, with "
        "their weights) after training at each rate of the common grid; bold is each architecture's "
        "lowest. The last column is the rate that the training above used.",
        columns=[
            Column(title="Architecture", is_numeric=False),
            *(Column(title=rate_text(rate), unit="learning rate") for rate in rates),
            Column(title="Used"),
        ],
        rows=rows,
    )
