"""Draw documents: equally often from every domain, within a domain in proportion to length."""

from __future__ import annotations

import numpy as np

from tasks.data.corpus import Split


class DocumentSampler:
    """Random draws of documents that have at least min_tokens tokens, including the document start.

    is_domain_balanced: if false, draw in proportion to length over all domains.
    domain:             if given, draw from this domain only.
    Raises ValueError where no document is long enough.
    """

    def __init__(
        self,
        split: Split,
        *,
        min_tokens: int = 2,
        is_domain_balanced: bool = True,
        domain: str | None = None,
    ) -> None:
        indices = np.flatnonzero(split.lengths_tokens >= min_tokens)
        if domain is not None:
            indices = indices[[split.domains[i] == domain for i in indices]] if len(indices) else indices
        if not len(indices):
            name, tokens = split.longest
            where = f" of domain {domain!r}" if domain is not None else ""
            raise ValueError(
                f"The {split.name} split has no document{where} of {min_tokens} tokens; its longest is "
                f"{name} with {tokens}. Use shorter contexts or longer documents."
            )
        # A document of length n has n - min_tokens + 1 windows.
        weights = (split.lengths_tokens[indices] - min_tokens + 1).astype(np.float64)
        if is_domain_balanced:
            domains = np.unique([split.domains[i] for i in indices], return_inverse=True)[1]
            weights /= np.bincount(domains, weights=weights)[domains]
        self._indices, self._cumulative = indices, np.cumsum(weights)

    def draw(self, rng: np.random.Generator) -> int:
        """Return the index of a document in the split."""
        place = rng.random() * self._cumulative[-1]
        return int(self._indices[np.searchsorted(self._cumulative, place, side="right")])
