"""What papers state in a sentence, for the page of `reports.claims`; tables: `reports.claims.tables`.

Figures are quoted from the papers named. What a paper shows as a plot only is given as its sentence, without
numbers read off the plot. "Second-hand": quoted from another text, not looked up in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

from reports.claims.measures import (
    Measure,
    adaptation_gains,
    ahead_of_the_transformer,
    bits_at_the_longest,
    dispatch_share,
    gain_beyond,
    longest_read,
    speed_ratio,
)
from reports.results.crossover import REFERENCE_ARCH

TTT, MAMBA, MAMBA2 = "arXiv 2407.04620", "arXiv 2312.00752", "arXiv 2405.21060"
TITANS, TITANS_REVISITED, SQUARED = "arXiv 2501.00663", "arXiv 2510.09551", "arXiv 2501.06252"
TITANS_ARCHS = ("titans_lmm", "titans_mac", "titans_mag", "titans_mal")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A published statement.

    says: the claim, with its figures. paper: and where in it. scale: of the paper's experiment.
    ours: what our counterpart is, or "none: " and why there is none. measure: takes it from records.
    kernel_lines: the lines of `harness.peers.kernels` that concern the claim too.
    """

    says: str
    paper: str
    scale: str
    ours: str
    measure: Measure | None = None
    kernel_lines: tuple[str, ...] = ()


CLAIMS = [
    Claim(
        says="TTT-Linear is ahead of the Transformer in speed from 8k tokens on",
        paper=f"{TTT}, abstract",
        scale="1.3B, prefill at batch 16, their own kernels",
        ours="prefill at each batch that was measured; of one layer alone, python -m harness.peers.kernels",
        measure=ahead_of_the_transformer("ttt_linear", paper_batch=16),
        kernel_lines=("layer_prefill_b16_2048", "layer_prefill_b16_8192", "layer_prefill_b16_32768"),
    ),
    Claim(
        says="TTT-MLP overtakes TTT-Linear at long context",
        paper=TTT,
        scale="125M to 1.3B, books, 1k to 32k tokens (a plot)",
        ours="bits a byte of the same text",
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
        ours="the longest text read, whatever came of it",
        measure=longest_read("titans_mac"),
    ),
    Claim(
        says="Titans does not always beat its baselines, because of chunking",
        paper=f"{TITANS_REVISITED}, an independent study, abstract",
        scale="masked words, time series and recommendation, their own reimplementation",
        ours="bits a byte; not their tasks",
        measure=bits_at_the_longest((REFERENCE_ARCH, *TITANS_ARCHS)),
    ),
    Claim(
        says="Mamba's scan is 20 to 40 times as fast as a scan in PyTorch, and ahead of FlashAttention-2 "
        "beyond 2k tokens",
        paper=f"{MAMBA}, section 4.5",
        scale="A100, the scan alone",
        ours="the second half, by whole models' prefill; none to the first: a whole scan in PyTorch is no "
        "side of a comparison here",
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
        ours="our own domains: greedy answers that are right, base → expert (LoRA)",
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
