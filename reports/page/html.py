"""Render the report: one HTML file that opens offline, and the figures as PNG beside it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from reports.draw.curves import draw
from reports.draw.heat_maps import Panels, draw_heat_maps
from reports.draw.style import Picture
from reports.results.load import ReportError, Results, load
from reports.results.ranking import make_ranking
from reports.sections import prepare
from reports.sections.base import Section
from reports.sections.provenance import experiment_names, warnings
from reports.sections.summary import findings, summary


@dataclass(frozen=True, kw_only=True)
class DrawnSection:
    """A section with its figures drawn."""

    section: Section
    pictures: list[Picture]
    panels: Panels | None


def render(folders: list[Path], output: Path) -> Path:
    """Read the folders' records, write `<output>/index.html` and its PNGs, and return the page.

    PNGs that an earlier page there links to and this one does not are deleted. Raises ReportError if there is
    nothing to report or the output cannot be written."""
    results = load(folders)
    try:
        output.mkdir(parents=True, exist_ok=True)
        page = output / "index.html"
        earlier = (
            _linked_figures(page.read_text(encoding="utf-8", errors="replace")) if page.is_file() else set()
        )
        text = _page(results, output)
        unfinished = output / ".index.html.unfinished"
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, page)
        for name in earlier - _linked_figures(text):
            (output / name).unlink(missing_ok=True)
    except OSError as error:
        raise ReportError(f"the report cannot be written to {output} ({error.strerror})") from error
    return page


def _linked_figures(text: str) -> set[str]:
    """Return the names of the PNGs that a page links to beside it."""
    return set(re.findall(r'href="(\w+\.png)"', text))


def _page(results: Results, output: Path) -> str:
    ranking = make_ranking(results)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("index.html.jinja").render(
        title=experiment_names(results),
        summary=summary(results, ranking),
        findings=findings(results, ranking),
        warnings=warnings(results),
        sections=[_drawn(section, output) for section in prepare(results)],
    )


def _drawn(section: Section, output: Path) -> DrawnSection:
    return DrawnSection(
        section=section,
        pictures=[draw(plot, output) for plot in section.figures],
        panels=draw_heat_maps(section.heat_maps, output) if section.heat_maps else None,
    )
