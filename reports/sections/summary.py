"""The sentences at the head of a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from reports.draw.numbers import integer, joined, number_text, percent, scaled
from reports.results.columns import RankingColumn
from reports.results.load import Results
from reports.results.queries import contexts_of, longest_trained
from reports.results.ranking import Ranking, Row

NEEDLE_MASTERED = 0.9


def summary(results: Results, ranking: Ranking) -> str:
    """Return one sentence: how many architectures, how large, trained on how much, read at which lengths."""
    if not results.series:
        tasks = dict.fromkeys(point.task.replace("_", " ") for point in results.points)
        return f"Measured without an architecture: {joined(list(tasks))}."
    known = [size for row in ranking.rows if (size := row.number("num_parameters"))]
    parts = [f"{len(results.series)} architectures"]
    if known:
        ends = dict.fromkeys((scaled(min(known)), scaled(max(known))))
        parts[0] += f" of {' to '.join(ends)} parameters"
    train = results.table("train")
    if "trained_tokens" in train and train["trained_tokens"].notna().any():
        tokens = train["trained_tokens"].dropna()
        ends = dict.fromkeys((scaled(tokens.min()), scaled(tokens.max())))
        longest = longest_trained(results)
        at = f" at lengths up to {integer(longest)}" if longest else ""
        parts.append(f"trained on {' to '.join(ends)} tokens each{at}")
    contexts = [*contexts_of(results, "perplexity"), *contexts_of(results, "needle")]
    if contexts:
        parts.append(f"measured at up to {integer(max(contexts))} tokens of context")
    return ", ".join(parts) + "."


def findings(results: Results, ranking: Ranking) -> list[tuple[str, str]]:
    """Return (heading, sentence) on the best of each column that has a superlative."""
    found = []
    for column in ranking.columns:
        rows = [row for row in ranking.rows if row.number(column.name) is not None]
        if column.superlative and rows:
            describe = SENTENCES.get(column.name, _best)
            found.append((column.superlative, describe(ranking, column, rows)))
    return found


def _best(ranking: Ranking, column: RankingColumn, rows: Sequence[Row]) -> str:
    pick = max if column.direction == "higher" else min
    best = pick(rows, key=lambda row: (row.number(column.name), row.series.label))
    context = column.at(ranking.cells)
    at = "" if context is None else f" at {integer(context)} tokens"
    number = number_text(best.number(column.name), column.unit)
    return f"{best.series.label}, {number}{column.summary_unit}{at}."


def _fewest_bits(ranking: Ranking, column: RankingColumn, rows: Sequence[Row]) -> str:
    """Name the first row, and the rows that its documents do not tell apart from it."""
    ties = [row.series.label for row in rows[1:] if row.values["behind"].admits_zero]
    tie = f" {joined(ties)} cannot be told apart from it on these documents." if ties else ""
    return _best(ranking, column, rows) + tie


def _mastered(ranking: Ranking, column: RankingColumn, rows: Sequence[Row]) -> str:
    """Name the smaller of two groups: those that recall nearly all, and the others."""
    accuracies = [(row.number(column.name) or 0.0, row.series.label) for row in rows]
    mastered = [label for accuracy, label in accuracies if accuracy >= NEEDLE_MASTERED]
    others = [label for accuracy, label in accuracies if accuracy < NEEDLE_MASTERED]
    which = ""
    if mastered and 0 < len(others) < len(mastered):
        which = f", not {joined(others)}"
    elif mastered and others:
        which = f": {joined(mastered)}"
    return f"{len(mastered)} of {len(rows)} recall {percent(NEEDLE_MASTERED)} or more{which}."


def _beyond(ranking: Ranking, column: RankingColumn, rows: Sequence[Row]) -> str:
    """Name the best among the rows that cover the most cells, so that like is compared with like."""
    values = [(row.values[column.name], row.series.label) for row in rows]
    most = max(value.num_cells for value, _ in values)
    accuracies = [(value.value or 0.0, label) for value, label in values if value.num_cells == most]
    best = max(accuracy for accuracy, _ in accuracies)
    if not best:
        return "none recalls any."
    names = joined([label for accuracy, label in accuracies if accuracy == best])
    return f"{names}, {percent(best)} over all longer contexts."


#: Columns whose finding says more than the best value.
SENTENCES: dict[str, Callable[[Ranking, RankingColumn, Sequence[Row]], str]] = {
    "bits_per_byte": _fewest_bits,
    "needle_trained": _mastered,
    "needle_beyond": _beyond,
}
