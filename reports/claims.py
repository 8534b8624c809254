"""What papers claim beside what our records hold: `python -m reports.claims FOLDER ... [--output FILE]`.

A page in Markdown, one row a claim: the claim and its source, the scale it was made at, and what was measured
here at each size, or that it was not. The figures are quoted from the papers named; what they show as plots
only is given as their sentence. Nothing is judged: the scales differ, and the page says so. Below stand times
against the machine's ceilings (`reports.ceilings`), where they were measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reports.ceilings import decode_lines, training_lines
from reports.crossover import REFERENCE_ARCH, Curve, crossovers, shared_contexts
from reports.load import ReportError, Results, is_number, load

NOT_MEASURED = "not measured"

#: Results and a size -> what was measured, in words, or None.
Measure = Callable[[Results, str], str | None]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A published statement.

    says: the claim, with its figures. paper: and where in it. scale: of the paper's experiment.
    measure: our counterpart, None where the project has none. ours: what the counterpart is, or why there
    is none.
    """

    says: str
    paper: str
    scale: str
    ours: str
    measure: Measure | None = None


def curve(results: Results, size: str, arch: str, task: str, metric: str, **cell: Any) -> dict[float, float]:
    """context_tokens -> a metric's mean over everything else that is measured there, where `cell` fits."""
    values: dict[float, list[float]] = {}
    for point in results.ok(task):
        if (point.arch, point.size) != (arch, size) or any(point.cell.get(k) != v for k, v in cell.items()):
            continue
        value = point.metrics.get(metric)
        if is_number(value):
            values.setdefault(float(point.cell["context_tokens"]), []).append(float(value))
    return {context: sum(some) / len(some) for context, some in sorted(values.items())}


def ahead_of_the_transformer(arch: str) -> Measure:
    """Where a prefill at batch 1 takes less time than the Transformer's."""

    def measure(results: Results, size: str) -> str | None:
        def times(name: str) -> Curve:
            return curve(results, size, name, "latency", "median_ms", phase="prefill", batch_size=1)

        ours, reference = times(arch), times(REFERENCE_ARCH)
        shared = shared_contexts(ours, reference)
        if not shared:
            return None
        longest = shared[-1]
        ratio = f"{reference[longest] / ours[longest]:.2f} times as fast at {longest:,.0f} tokens"
        crossings = [c for c in crossovers(ours, reference) if c.is_below_after]
        if ours[longest] >= reference[longest]:
            return f"not ahead; {ratio}"
        if not crossings:
            return f"ahead from the shortest measured, {shared[0]:,.0f} tokens; {ratio}"
        return f"ahead from about {crossings[-1].context_tokens:,.0f} tokens; {ratio}"

    return measure


def speed_ratio(arch: str, other: str, phase: str) -> Measure:
    """How many times as fast as `other`, at the longest context and the largest batch that both have."""

    def measure(results: Results, size: str) -> str | None:
        batches = sorted(
            {p.cell["batch_size"] for p in results.ok("latency") if p.size == size}, reverse=True
        )
        for batch in batches:
            cell = {"phase": phase, "batch_size": batch}
            ours, theirs = (
                curve(results, size, name, "latency", "tokens_per_s", **cell) for name in (arch, other)
            )
            shared = shared_contexts(ours, theirs)
            if shared:
                ratio = ours[shared[-1]] / theirs[shared[-1]]
                return f"{ratio:.2f} times, {phase} at {shared[-1]:,.0f} tokens, batch {batch}"
        return None

    return measure


def at_the_longest(task: str, metric: str, archs: tuple[str, ...], unit: str) -> Measure:
    """A metric of several architectures at the longest context that all of them have."""

    def measure(results: Results, size: str) -> str | None:
        curves = {arch: curve(results, size, arch, task, metric) for arch in archs}
        measured = {arch: values for arch, values in curves.items() if values}
        shared = set.intersection(*(set(values) for values in measured.values())) if measured else set()
        if len(measured) < 2 or not shared:
            return None
        longest = max(shared)
        percent = 100 if unit == "%" else 1
        shown = [
            f"{arch} {percent * values[longest]:.{0 if unit == '%' else 3}f}{'%' if unit == '%' else ''}"
            for arch, values in measured.items()
        ]
        return f"{', '.join(shown)} {'' if unit == '%' else unit + ' '}at {longest:,.0f} tokens"

    return measure


def gain_beyond(archs: tuple[str, ...], context_tokens: int) -> Measure:
    """By how much the loss falls from `context_tokens` of context to the longest."""

    def measure(results: Results, size: str) -> str | None:
        shown = []
        for arch in archs:
            values = curve(results, size, arch, "perplexity", "bits_per_byte")
            if values and context_tokens in values and max(values) > context_tokens:
                longest = max(values)
                shown.append(
                    f"{arch} {values[longest] - values[context_tokens]:+.3f} bits a byte to {longest:,.0f}"
                )
        return ", ".join(shown) or None

    return measure


def longest_read(arch: str) -> Measure:
    """The longest context that was read to its end."""

    def measure(results: Results, size: str) -> str | None:
        lengths = [
            p.cell["context_tokens"]
            for task in ("latency", "perplexity", "needle")
            for p in results.ok(task)
            if (p.arch, p.size) == (arch, size) and p.details.get("is_prefilled", True)
        ]
        return f"{max(lengths):,} tokens" if lengths else None

    return measure


def dispatch_share(results: Results, size: str) -> str | None:
    """The first pass' time over the second's."""
    shares = []
    for point in results.ok("latency"):
        first, total = point.metrics.get("dispatch_ms"), point.metrics.get("median_ms")
        if point.size == size and is_number(first) and is_number(total) and total > first:
            shares.append((point.cell["context_tokens"], first / (total - first)))
    if not shares:
        return None
    return ", ".join(f"{100 * share:.0f}% at {context:,} tokens" for context, share in sorted(shares))


TTT, MAMBA, MAMBA2 = "arXiv 2407.04620", "arXiv 2312.00752", "arXiv 2405.21060"
TITANS, SQUARED = "arXiv 2501.00663", "arXiv 2501.06252"
TITANS_ARCHS = ("titans_lmm", "titans_mac", "titans_mag", "titans_mal")

CLAIMS = [
    Claim(
        says="TTT-Linear is ahead of the Transformer in speed from 8k tokens on",
        paper=f"{TTT}, abstract",
        scale="1.3B, prefill at batch 16, their own kernels",
        ours="prefill at batch 1",
        measure=ahead_of_the_transformer("ttt_linear"),
    ),
    Claim(
        says="TTT-MLP overtakes TTT-Linear at long context",
        paper=TTT,
        scale="125M to 1.3B, books, 1k to 32k tokens (a plot)",
        ours="bits a byte of the same text",
        measure=at_the_longest("perplexity", "bits_per_byte", ("ttt_linear", "ttt_mlp"), "bits a byte"),
    ),
    Claim(
        says="Mamba's loss stops falling after 16k tokens of context; TTT's and the Transformer's do not",
        paper=f"{TTT}, abstract",
        scale="1.3B, books, 32k tokens (a plot)",
        ours="change from 16,384 tokens of context on",
        measure=gain_beyond((REFERENCE_ARCH, "mamba", "ttt_linear", "ttt_mlp"), 16384),
    ),
    Claim(
        says="the dual form trains over 5 times as fast as the primal form",
        paper=f"{TTT}, section 2.5",
        scale="their implementation in JAX",
        ours="the primal form is the reference here, which is made to be read",
    ),
    Claim(
        says="WikiText perplexity: Transformer++ 31.52, Mamba 30.83, TTT 27.44, LMM 26.18, MAC 25.43, "
        "MAG 25.07, MAL 24.69",
        paper=f"{TITANS}, table 1",
        scale="340M, 15B tokens",
        ours="bits a byte, not their corpus",
        measure=at_the_longest(
            "perplexity",
            "bits_per_byte",
            (REFERENCE_ARCH, "mamba", "ttt_linear", *TITANS_ARCHS),
            "bits a byte",
        ),
    ),
    Claim(
        says="needle (S-NIAH, number) at 16k: TTT 4.4, Mamba-2 0, LMM 80.2, MAC 97.4, MAG 98.6, MAL 96.4%",
        paper=f"{TITANS}, table 2",
        scale="trained at 4k tokens",
        ours="our needle, mean over depths",
        measure=at_the_longest("needle", "accuracy", ("ttt_linear", "mamba2", *TITANS_ARCHS), "%"),
    ),
    Claim(
        says="perplexity of the memory alone 27.01; linear 28.49, no momentum 28.98, no decay 29.04",
        paper=f"{TITANS}, table 5",
        scale="their smallest model",
        ours="bits a byte (experiment=titans_ablation)",
        measure=at_the_longest(
            "perplexity",
            "bits_per_byte",
            (
                "titans_lmm",
                *(f"titans_lmm_{name}" for name in ("linear", "no_momentum", "no_decay")),
            ),
            "bits a byte",
        ),
    ),
    Claim(
        says="contexts beyond 2M tokens",
        paper=f"{TITANS}, abstract",
        scale="a needle in books (BABILong)",
        ours="the longest text read, whatever came of it",
        measure=longest_read("titans_mac"),
    ),
    Claim(
        says="Mamba's scan is 20 to 40 times as fast as a scan in PyTorch, and ahead of FlashAttention-2 "
        "beyond 2k tokens",
        paper=f"{MAMBA}, section 4.5",
        scale="A100, the scan alone",
        ours="the second half, by whole models' prefill; the first by python -m harness.kernels",
        measure=ahead_of_the_transformer("mamba"),
    ),
    Claim(
        says="Mamba has 4 to 5 times a Transformer's inference throughput",
        paper=f"{MAMBA}, section 4.5",
        scale="their kernels, A100",
        ours="decode",
        measure=speed_ratio("mamba", REFERENCE_ARCH, "decode"),
    ),
    Claim(
        says="state-space duality is 2 to 8 times as fast as Mamba's scan",
        paper=f"{MAMBA2}, section 9.3",
        scale="A100, the layer's core alone",
        ours="whole models' prefill",
        measure=speed_ratio("mamba2", "mamba", "prefill"),
    ),
    Claim(
        says="state-space duality crosses FlashAttention-2 at 2k tokens and is 6 times as fast at 16k",
        paper=f"{MAMBA2}, section 9.3",
        scale="A100, the layer's core alone",
        ours="whole models' prefill at batch 1",
        measure=ahead_of_the_transformer("mamba2"),
    ),
    Claim(
        says="GSM8K 75.89 to 79.15 with singular-value experts, 77.18 with LoRA",
        paper=SQUARED,
        scale="Llama-3-8B, trained with rewards",
        ours="no model of that size was trained; gains on small ones are in the report, under adaptation",
    ),
    Claim(
        says="the first pass takes 13% (MATH), 19% (HumanEval), 47% (ARC-C) of the second's time",
        paper=SQUARED,
        scale="Llama-3-8B",
        ours="dispatch over the prefill after it, one token generated",
        measure=dispatch_share,
    ),
]


def page(results: Results) -> str:
    """The Markdown page."""
    sizes = sorted({point.size for point in results.points if point.arch})
    lines = [
        "# Published claims beside these records",
        "",
        f"Sizes measured here: {', '.join(sizes)}. The papers' models are larger or trained on more, on "
        "other text, with other kernels on other cards: a row sets figures side by side, and neither "
        "confirms nor refutes.",
        "",
        "| claim | source | its scale | our counterpart | measured here |",
        "|---|---|---|---|---|",
    ]
    for claim in CLAIMS:
        cells = (claim.says, claim.paper, claim.scale, claim.ours, measured(claim, results, sizes))
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join([*lines, "", *decode_lines(results), *training_lines(results)]).rstrip() + "\n"


def measured(claim: Claim, results: Results, sizes: list[str]) -> str:
    """Our figures at every size that has them, or that there are none."""
    found = [(size, claim.measure(results, size)) for size in sizes] if claim.measure is not None else []
    return "; ".join(f"{size}: {text}" for size, text in found if text) or NOT_MEASURED


def main(arguments: list[str] | None = None) -> int:
    """Writes the page, to FILE or the terminal; 2 where nothing could be read."""
    parser = argparse.ArgumentParser(
        prog="python -m reports.claims", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("folders", metavar="FOLDER", nargs="+", type=Path, help="holds records/*.jsonl")
    parser.add_argument("--output", metavar="FILE", type=Path, help="default: the terminal")
    options = parser.parse_args(arguments)
    try:
        text = page(load(options.folders))
        if options.output is None:
            print(text, end="")
        else:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(text, encoding="utf-8")
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
