"""What the page shows, one file per task: each file prepares a section, and nothing here is drawn.

TASK_SECTIONS lists the sections of tasks once, in the order of the page. A task that is not listed has a
section made from its declarations.
"""

from __future__ import annotations

from collections.abc import Callable

from reports.results.load import Results
from reports.sections import declared, failures, provenance, ranking
from reports.sections.base import Section
from reports.sections.cost import cost, dispatch, quality_against_cost, speed
from reports.sections.quality import loss, needle
from reports.sections.training import adaptation, learning_rate_search, training, training_speed

#: A section prepares itself from the results; None where it has nothing to say.
Prepare = Callable[[Results], Section | None]

#: What prepares each section, and the tasks whose numbers it shows.
TASK_SECTIONS: tuple[tuple[Prepare, tuple[str, ...]], ...] = (
    (loss.section, ("perplexity",)),
    (needle.section, ("needle",)),
    (cost.section, ("latency", "cost")),
    (speed.section, ("latency",)),
    (quality_against_cost.section, ()),
    (training.section, ("train",)),
    (learning_rate_search.section, ("learning_rate_search",)),
    (training_speed.section, ("training_speed",)),
    (adaptation.section, ("adaptation",)),
    (dispatch.section, ("latency",)),
)
#: What prepares the sections about the runs themselves; the calibration stands among the facts of a machine.
RUN_SECTIONS: tuple[Prepare, ...] = (
    failures.section,
    provenance.section,
    provenance.configuration_section,
)


def prepare(results: Results) -> list[Section]:
    """Return the sections of the page, in order. Those about architectures need an architecture."""
    shown = {task for _, tasks in TASK_SECTIONS for task in tasks} | {"calibration"}
    others = dict.fromkeys(point.task for point in results.points if point.task not in shown)
    about_architectures = [ranking.section, *(section for section, _ in TASK_SECTIONS)]
    prepared = [
        *(section(results) for section in (about_architectures if results.series else [])),
        *(declared.section(results, task) for task in others),
        *(section(results) for section in RUN_SECTIONS),
    ]
    return [section for section in prepared if section is not None]
