"""What papers state, and our counterpart of each statement: the source of the page of `reports.claims`.

Figures are quoted from the papers that are named. Where a paper shows a plot only, its sentence stands here
without numbers read off the plot. "Second-hand" means quoted from another text and not looked up in the
paper.
"""

from __future__ import annotations

from dataclasses import dataclass

from reports.claims.measures import (
    ColumnMeasure,
    Measure,
    adaptation_gains,
    ahead_of_the_transformer,
    bits_at_the_longest,
    bits_column,
    dispatch_share,
    gain_beyond,
    longest_read,
    needle_column,
    speed_ratio,
)
from reports.results.crossover import REFERENCE_ARCH

TTT, MAMBA, MAMBA2 = "arXiv 2407.04620", "arXiv 2312.00752", "arXiv 2405.21060"
TITANS, TITANS_REVISITED, SQUARED = "arXiv 2501.00663", "arXiv 2510.09551", "arXiv 2501.06252"
TITANS_ARCHS = ("titans_lmm", "titans_mac", "titans_mag", "titans_mal")

#: Our columns beside a published table, each with its title where nothing was measured.
BITS = ("bits per byte", bits_column)
NEEDLE = ("our needle", needle_column)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement in words.

    says:         the claim with its figures.
    paper:        the paper, and the place in it.
    scale:        the scale of the paper's experiment.
    ours:         what our counterpart is, or "none: " and why there is none.
    measure:      takes our counterpart from records.
    kernel_cases: the comparisons of `harness.peers.kernels` that concern the claim too.
    """

    says: str
    paper: str
    scale: str
    ours: str
    measure: Measure | None = None
    kernel_cases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """A table of figures.

    title:    names it on the page.
    paper:    the paper, and the place in it.
    scale:    the scale of the paper's experiment.
    ours:     what our counterparts are, which columns have none, and why.
    columns:  their titles; the first heads the names of the rows.
    rows:     a name, our architecture (None where there is no counterpart) and a cell per further column.
    measures: our columns.
    """

    title: str
    paper: str
    scale: str
    ours: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, str | None, tuple[str, ...]], ...]
    measures: tuple[tuple[str, ColumnMeasure], ...] = ()


CLAIMS = [
    Claim(
        says="TTT-Linear is ahead of the Transformer in speed from 8k tokens on",
        paper=f"{TTT}, abstract",
        scale="1.3B, prefill at batch 16, their own kernels",
        ours="prefill at each batch that was measured; one layer alone: python -m harness.peers.kernels",
        measure=ahead_of_the_transformer("ttt_linear", paper_batch=16),
        kernel_cases=("layer_prefill_b16_2048", "layer_prefill_b16_8192", "layer_prefill_b16_32768"),
    ),
    Claim(
        says="TTT-MLP overtakes TTT-Linear at long context",
        paper=TTT,
        scale="125M to 1.3B, books, 1k to 32k tokens (a plot)",
        ours="bits per byte of the same text",
        measure=bits_at_the_longest(("ttt_linear", "ttt_mlp")),
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
        ours="none: the primal form is the reference here, which is made to be read",
    ),
    Claim(
        says="contexts beyond 2M tokens",
        paper=f"{TITANS}, abstract",
        scale="a needle in books (BABILong)",
        ours="the longest text that was read, whatever the answers were",
        measure=longest_read("titans_mac"),
    ),
    Claim(
        says="Titans does not always beat its baselines, because of chunking",
        paper=f"{TITANS_REVISITED}, an independent study, abstract",
        scale="masked words, time series and recommendation, their own reimplementation",
        ours="bits per byte; not their tasks",
        measure=bits_at_the_longest((REFERENCE_ARCH, *TITANS_ARCHS)),
    ),
    Claim(
        says="Mamba's scan is 20 to 40 times as fast as a scan in PyTorch, and ahead of FlashAttention-2 "
        "beyond 2k tokens",
        paper=f"{MAMBA}, section 4.5",
        scale="A100, the scan alone",
        ours="whole models' prefill for the second half; nothing for the first: no comparison here has a "
        "whole scan in PyTorch on one side",
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
        ours="whole models' prefill",
        measure=ahead_of_the_transformer("mamba2"),
    ),
    Claim(
        says="base → singular-value experts (LoRA): GSM8K 75.89 → 79.15 (77.18), MBPP-Pro 64.65 → 66.67 "
        "(67.68), ARC-E 88.59 → 89.56",
        paper=f"{SQUARED}, second-hand",
        scale="Llama-3-8B, trained with rewards",
        ours="our own domains: right greedy answers, base → expert (LoRA)",
        measure=adaptation_gains,
    ),
    Claim(
        says="the first pass takes 13% (MATH), 19% (HumanEval), 47% (ARC-C) of the second's time",
        paper=f"{SQUARED}, second-hand",
        scale="Llama-3-8B",
        ours="dispatch over the prefill after it, one token generated",
        measure=dispatch_share,
    ),
]

TABLES = [
    PublishedTable(
        title="From linear attention to TTT-Linear, perplexity",
        paper=f"{TTT}, table 1",
        scale="125M, the Pile, 2k tokens; each row adds to the one above",
        ours="none: TTT-Linear is trained whole here, not in these steps",
        columns=("step", "perplexity"),
        rows=(
            ("linear attention", None, ("15.91",)),
            ("linear attention, improved", None, ("15.23",)),
            ("+ learned W0", None, ("15.27",)),
            ("+ LayerNorm and residual", None, ("14.05",)),
            ("+ mini-batches of 16", None, ("12.35",)),
            ("+ learned eta", None, ("11.99",)),
            ("+ Mamba backbone", None, ("11.09",)),
        ),
    ),
    PublishedTable(
        title="Titans and its baselines: language",
        paper=f"{TITANS}, table 1",
        scale="340M on 15B tokens, 760M on 30B, FineWeb-Edu, trained at 4k tokens",
        ours="bits per byte beside the perplexities, on other text; none for accuracy: those question sets "
        "are not among our tasks",
        columns=(
            "model",
            *("340M WikiText ppl", "340M LAMBADA ppl", "340M mean accuracy"),
            *("760M WikiText ppl", "760M LAMBADA ppl", "760M mean accuracy"),
        ),
        rows=(
            ("Transformer++", REFERENCE_ARCH, ("31.52", "41.08", "42.92", "25.21", "27.64", "48.69")),
            ("Mamba", "mamba", ("30.83", "40.21", "43.59", "28.12", "23.96", "47.22")),
            ("Mamba-2", "mamba2", ("–", "–", "–", "22.94", "28.37", "48.34")),
            ("TTT", "ttt_linear", ("27.44", "34.19", "44.51", "24.17", "23.51", "47.32")),
            ("LMM", "titans_lmm", ("26.18", "29.97", "46.17", "20.04", "21.96", "51.56")),
            ("MAC", "titans_mac", ("25.43", "28.13", "47.36", "19.93", "20.12", "52.51")),
            ("MAG", "titans_mag", ("25.07", "28.72", "47.54", "18.61", "19.86", "52.50")),
            ("MAL", "titans_mal", ("24.69", "28.80", "46.55", "19.07", "20.33", "50.97")),
        ),
        measures=(BITS,),
    ),
    PublishedTable(
        title="A needle in a haystack (S-NIAH), % at 2k / 4k / 8k / 16k tokens",
        paper=f"{TITANS}, table 2",
        scale="trained at 4k tokens",
        ours="our needle, a number in real text, mean over depths, at our lengths; none for words",
        columns=("model", "passkey", "number", "word"),
        rows=(
            (
                "TTT",
                "ttt_linear",
                ("98.4 / 98.8 / 98.0 / 88.4", "60.2 / 36.6 / 10.2 / 4.4", "78.8 / 28.0 / 4.4 / 0"),
            ),
            (
                "Mamba-2",
                "mamba2",
                ("98.6 / 61.4 / 31.0 / 5.4", "98.4 / 55.8 / 14.2 / 0", "42.2 / 4.2 / 0 / 0"),
            ),
            (
                "LMM",
                "titans_lmm",
                ("99.8 / 98.4 / 98.2 / 96.2", "100 / 99.8 / 93.4 / 80.2", "90.4 / 89.4 / 85.8 / 80.6"),
            ),
            (
                "MAC",
                "titans_mac",
                ("99.2 / 98.8 / 99.0 / 98.4", "99.6 / 98.2 / 97.6 / 97.4", "98.2 / 98.2 / 95.6 / 95.2"),
            ),
            (
                "MAG",
                "titans_mag",
                ("99.4 / 98.0 / 97.4 / 97.4", "99.2 / 98.8 / 97.2 / 98.6", "98.0 / 98.0 / 90.2 / 88.2"),
            ),
            (
                "MAL",
                "titans_mal",
                ("98.8 / 98.6 / 98.8 / 97.8", "99.8 / 98.1 / 96.8 / 96.4", "98.0 / 97.4 / 92.0 / 90.4"),
            ),
        ),
        measures=(NEEDLE,),
    ),
    PublishedTable(
        title="Titans' memory with one component less",
        paper=f"{TITANS}, table 5",
        scale="their smallest model",
        ours="experiment=titans_ablation: bits per byte beside the perplexity, our needle beside the long "
        "context; none for accuracy: those question sets are not among our tasks",
        columns=("memory", "perplexity", "accuracy", "long context"),
        rows=(
            ("LMM", "titans_lmm", ("27.01", "47.83", "92.68")),
            ("linear memory", "titans_lmm_linear", ("28.49", "46.97", "85.34")),
            ("no momentum", "titans_lmm_no_momentum", ("28.98", "45.49", "87.12")),
            ("no decay", "titans_lmm_no_decay", ("29.04", "45.11", "85.60")),
        ),
        measures=(BITS, NEEDLE),
    ),
]
