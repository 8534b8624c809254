"""The few sentences at the head of a report."""

from __future__ import annotations

from reports.draw.numbers import bytes_text, integer, joined, percent, scaled, significant
from reports.results.load import Results
from reports.results.queries import contexts_of, longest_trained
from reports.results.ranking import Ranking

NEEDLE_MASTERED = 0.9


def summary(results: Results, ranking: Ranking) -> str:
    """One sentence: how many architectures, how large, trained on what, read at what length."""
    if not results.series:
        tasks = dict.fromkeys(point.task.replace("_", " ") for point in results.points)
        return f"Measured without an architecture: {joined(list(tasks))}."
    sizes = [row.numbers["num_parameters"] for row in ranking.rows]
    known = [size for size in sizes if size]
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
    """(heading, sentence) of the best in each respect, ties named."""
    found = []
    rows = ranking.rows
    if rows and rows[0].numbers["bits_per_byte"] is not None:
        ties = [row.series.label for row in rows[1:] if row.behind and row.behind.admits(0)]
        tie = f" {joined(ties)} cannot be told apart from it on these documents." if ties else ""
        at = integer(ranking.context_tokens)
        text = f"{rows[0].series.label}, {rows[0].numbers['bits_per_byte']:.3f} at {at} tokens."
        found.append(("Fewest bits per byte", text + tie))
    trained = [(row.needle_trained.accuracy, row.series.label) for row in rows if row.needle_trained]
    if trained:
        mastered = [label for accuracy, label in trained if accuracy >= NEEDLE_MASTERED]
        others = [label for accuracy, label in trained if accuracy < NEEDLE_MASTERED]
        text = f"{len(mastered)} of {len(trained)} recall {percent(NEEDLE_MASTERED)} or more"
        which = f", not {joined(others)}" if mastered and 0 < len(others) < len(mastered) else ""
        which = f": {joined(mastered)}" if others and not which and mastered else which
        found.append(("Needle, trained lengths", f"{text}{which}."))
    beyond = [(row.needle_beyond, row.series.label) for row in rows if row.needle_beyond]
    most = max((entry.num_cells for entry, _ in beyond), default=0)
    beyond = [(entry, label) for entry, label in beyond if entry.num_cells == most]  # like with like
    if beyond:
        best = max(entry.accuracy for entry, _ in beyond)
        names = joined([label for entry, label in beyond if entry.accuracy == best])
        text = f"{names}, {percent(best)} over all longer contexts" if best else "none recalls any"
        found.append(("Needle, beyond", f"{text}."))
    for phase, unit in (("prefill", "ms"), ("decode", "ms a token")):
        times = [(row.numbers[f"{phase}_ms"], row.series.label) for row in rows if row.numbers[f"{phase}_ms"]]
        if times:
            value, label = min(times)
            at = integer(ranking.phase_context_tokens[phase])
            found.append((f"Fastest {phase}", f"{label}, {significant(value)} {unit} at {at} tokens."))
    states = [(row.numbers["state_bytes"], row.series.label) for row in rows if row.numbers["state_bytes"]]
    if states:
        value, label = min(states)
        at = integer(ranking.state_context_tokens)
        found.append(("Smallest state", f"{label}, {bytes_text(value)} at {at} tokens."))
    return found
