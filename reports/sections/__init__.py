"""What the page shows, one file per task: each file prepares a section, and nothing here is drawn.

SECTIONS lists them in the order of the page.
"""

from __future__ import annotations

from collections.abc import Callable

from reports.results.load import Results
from reports.sections import failures, provenance, ranking
from reports.sections.base import Section
from reports.sections.cost import cost, dispatch, quality_against_cost
from reports.sections.quality import loss, needle
from reports.sections.training import adaptation, learning_rate_search, training

#: A section prepares itself from the results; None where it has nothing to say.
SECTIONS: tuple[Callable[[Results], Section | None], ...] = (
    ranking.section,
    loss.section,
    needle.section,
    cost.section,
    quality_against_cost.section,
    training.section,
    learning_rate_search.section,
    adaptation.section,
    dispatch.section,
    failures.section,
    provenance.section,
    provenance.configuration_section,
)


def prepare(results: Results) -> list[Section]:
    """Return the sections of the page, in order."""
    prepared = (section(results) for section in SECTIONS)
    return [section for section in prepared if section is not None]
