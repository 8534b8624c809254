"""LoRA, the baseline that Transformer² is held against: W + scale B A with A and B of a low rank
(Hu et al. 2021, arXiv 2106.09685, section 4.1).

Glossary beside the project's: E adapters, one a domain; W (m, n); A (rank, n); B (m, rank).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

#: A feed-forward's matrices stand in the order gate, up, down; rank 1 is handed out to them in this one.
MATRICES_OF_A_LAYER = 3
PREFERENCE = (2, 1, 0)


class LowRankAdapters(nn.Module):
    """E adapters of the same feed-forward matrices, each with the same number of parameters.

    shapes: (m, n) of every feed-forward matrix, three a layer: gate, up, down.
    budget: the parameters an adapter may have; what a singular-value expert has, sum of min(m, n).
    rank:   None keeps to the budget. Rank 1 has m + n parameters in a matrix where the expert has
            min(m, n), so that the budget never reaches all matrices: as many as fit get rank 1, those
            that write to the residual stream (down) first, then up, then gate, and where not all
            layers' fit, layers evenly spaced. One matrix at least is adapted. A number is the rank on
            every matrix, as published LoRAs have it, whatever that makes of the budget.
    scale:  what the product is multiplied by, alpha / rank in the paper's terms.

    A starts as PyTorch starts a linear layer, uniform within 1 / sqrt(n), and B at zero: an untrained
    adapter changes nothing. Raises ValueError where the rank is not positive.
    """

    def __init__(
        self,
        *,
        shapes: Sequence[tuple[int, int]],
        num_adapters: int,
        budget: int,
        rank: int | None = None,
        scale: float = 2.0,
    ) -> None:
        super().__init__()
        if rank is not None and rank < 1:
            raise ValueError(f"lora_rank={rank} must be positive")
        self.rank, self.scale, self.budget = rank or 1, scale, budget
        self.num_matrices = len(shapes)
        self.indices = list(range(len(shapes))) if rank else place(shapes, budget)
        adapted = [shapes[index] for index in self.indices]
        self.a = nn.ParameterList(torch.empty(num_adapters, self.rank, n) for _, n in adapted)
        self.b = nn.ParameterList(torch.empty(num_adapters, m, self.rank) for m, _ in adapted)
        self.requires_grad_(False)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Put every adapter back to its start, the same each time."""
        generator = torch.Generator(device="cpu").manual_seed(0)
        for a, b in zip(self.a, self.b, strict=True):
            values = torch.rand(a.shape, generator=generator, device="cpu")
            a.copy_((2.0 * values - 1.0) / a.shape[-1] ** 0.5)
            b.zero_()

    @property
    def num_parameters_each(self) -> int:
        """Return the parameters of one adapter."""
        return sum(p[0].numel() for p in (*self.a, *self.b))

    @property
    def description(self) -> str:
        """Rank, matrices and parameters of an adapter, and how far they are from the budget."""
        each = self.num_parameters_each
        return (
            f"LoRA of rank {self.rank} on {len(self.indices)} of {self.num_matrices} feed-forward matrices, "
            f"{each} parameters a domain against an expert's {self.budget} ({each / self.budget - 1:+.0%})"
        )

    @contextmanager
    def attached(self, matrices: Sequence[nn.Module], adapter: int) -> Iterator[None]:
        """Within the block, the `matrices` (modules whose first argument is their input) compute with
        one adapter's product added."""

        def hook(a: Tensor, b: Tensor) -> Callable[..., Tensor]:
            def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
                x = inputs[0]
                return output + self.scale * (x @ a.T.to(x.dtype)) @ b.T.to(x.dtype)

            return add

        handles = [
            matrices[index].register_forward_hook(hook(a[adapter], b[adapter]))
            for index, a, b in zip(self.indices, self.a, self.b, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def place(shapes: Sequence[tuple[int, int]], budget: int) -> list[int]:
    """Choose the matrices that get rank 1 within the budget; see `LowRankAdapters`."""
    picked: list[int] = []
    for kind in PREFERENCE:
        layers = range(kind, len(shapes), MATRICES_OF_A_LAYER)
        count = min(len(layers), budget // sum(shapes[kind]))
        picked += [layers[(2 * i + 1) * len(layers) // (2 * count)] for i in range(count)]
        budget -= count * sum(shapes[kind])
        if count < len(layers):
            break  # what is left would not do for one more of the same size
    return sorted(picked) or [len(shapes) - 1]
