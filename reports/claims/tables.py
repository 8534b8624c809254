"""Tables of papers, for the page of `reports.claims`: their figures as numbers, quoted from the papers named,
with the columns of ours that stand beside them."""

from __future__ import annotations

from dataclasses import dataclass

from reports.claims.ledger import TITANS, TTT
from reports.claims.measures import ColumnMeasure, bits_column, needle_column
from reports.results.crossover import REFERENCE_ARCH


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """paper: and where in it. scale: of the paper's experiment. ours: what our counterparts are, and which
    columns have none and why. columns: titles, the first that of the rows. rows: name, our architecture (None
    where there is no counterpart) and a cell a further column. measures: our columns, with the title of each
    where nothing was measured."""

    title: str
    paper: str
    scale: str
    ours: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, str | None, tuple[str, ...]], ...]
    measures: tuple[tuple[str, ColumnMeasure], ...] = ()


BITS = ("bits a byte", bits_column)
NEEDLE = ("our needle", needle_column)

TABLES = [
    PublishedTable(
        title="What makes TTT-Linear of linear attention, perplexity",
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
        ours="bits a byte beside the perplexities, of other text; none to accuracy: those question sets are "
        "not among our tasks",
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
        ours="our needle, a number in real text, mean over depths, at our lengths; none to words",
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
        ours="experiment=titans_ablation: bits a byte beside the perplexity, our needle beside the long "
        "context; none to accuracy: those question sets are not among our tasks",
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
