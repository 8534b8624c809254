"""Renders the report: one HTML file that opens offline, and the figures as PNG beside it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from matplotlib import colormaps
from matplotlib.colors import to_hex

from reports.draw.style import Picture
from reports.draw.table import Table
from reports.results.load import ReportError, Results, load
from reports.results.ranking import Ranking, make_ranking
from reports.sections.cost.cost import cost_curves, cost_figure, crossover_table, latency_cells_table
from reports.sections.cost.dispatch import dispatch_table
from reports.sections.cost.quality_against_cost import scatter_figures
from reports.sections.failures import failures_table
from reports.sections.provenance import commands, environment_table, experiment_names, jobs, warnings
from reports.sections.quality.loss import domains_table, loss_by_context, loss_by_position, perplexity_table
from reports.sections.quality.needle import needle_by_context, needle_log_probability, needle_table
from reports.sections.quality.needle_heat_maps import COLOUR_MAP, heat_map_figure, heat_map_panels, make_grids
from reports.sections.ranking import ranking_notes, ranking_table
from reports.sections.summary import findings, summary
from reports.sections.training.adaptation import adaptation_table, has_experts, mixtures_table, tuning_table
from reports.sections.training.experts import HINT, experts_table
from reports.sections.training.learning_rate_search import learning_rate_figure, learning_rate_table
from reports.sections.training.training import training_figures, training_table


@dataclass(kw_only=True)
class Section:
    """A part of the page. `tables` are shown, `folded` ones open on demand; `absent` says so where
    the records hold nothing for the section."""

    name: str
    title: str
    notes: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    folded: list[tuple[str, Table]] = field(default_factory=list)
    panels: list[tuple] = field(default_factory=list)
    panels_picture: Picture | None = None
    absent: str = ""


def render(folders: list[Path], output: Path) -> Path:
    """Reads the folders' records and writes `<output>/index.html` and its PNGs; returns the page.
    PNGs that an earlier page there links to and this one does not are deleted.

    Raises ReportError if there is nothing to report or the output cannot be written."""
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
    """The names of the PNGs that a page links to beside it."""
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
    colours = colormaps[COLOUR_MAP]
    return environment.get_template("index.html.jinja").render(
        title=experiment_names(results),
        summary=summary(results, ranking),
        findings=findings(results, ranking),
        warnings=warnings(results),
        commands=commands(results),
        environment=environment_table(results),
        ranking=ranking_table(ranking),
        ranking_notes=ranking_notes(results),
        sections=_sections(results, ranking, output),
        failures=failures_table(results),
        damaged_lines=results.damaged_lines,
        jobs=jobs(results),
        scale=[to_hex(colours(step / 10)) for step in range(11)],
    )


def _sections(results: Results, ranking: Ranking, output: Path) -> list[Section]:
    sections = [
        _loss_section(results, output),
        _needle_section(results, output),
        _cost_section(results, output),
        Section(
            name="quality-cost",
            title="Quality against cost",
            pictures=scatter_figures(results, ranking, output),
            absent="No architecture has both a quality and a cost.",
        ),
        _training_section(results, output),
    ]
    if has_experts(results):
        sections.append(_adaptation_section(results))
    dispatch = dispatch_table(results)
    if dispatch:
        note = (
            "A dispatching architecture first reads the whole prompt to choose its experts and then answers; "
            "its time to first token holds both passes. This is what the first one takes."
        )
        sections.append(Section(name="dispatch", title="Dispatch", notes=[note], tables=[dispatch]))
    return sections


def _loss_section(results: Results, output: Path) -> Section:
    section = Section(
        name="loss", title="Loss against position and context", absent="No perplexity was measured."
    )
    section.pictures = [p for p in (loss_by_context(results, output), loss_by_position(results, output)) if p]
    if any(point.details.get("adaptation") for point in results.ok("perplexity")):
        section.notes = [HINT]
    if results.of("perplexity"):
        section.folded = [("Every number", perplexity_table(results))]
        domains = domains_table(results)
        section.folded += [("By domain", domains)] if domains else []
    return section


def _needle_section(results: Results, output: Path) -> Section:
    section = Section(name="needle", title="Needle in a haystack", absent="The needle was not measured.")
    if not results.of("needle"):
        return section
    section.notes = [
        "A key and a number are hidden in real text and asked for at its end. One panel an architecture, all "
        "on one colour scale."
    ]
    section.pictures = [
        p for p in (needle_by_context(results, output), needle_log_probability(results, output)) if p
    ]
    grids = make_grids(results)
    section.panels = heat_map_panels(grids)
    section.panels_picture = heat_map_figure(grids, output)
    section.folded = [("Every number", needle_table(results))]
    return section


def _cost_section(results: Results, output: Path) -> Section:
    section = Section(name="cost", title="Cost against context", absent="No cost was measured.")
    curves = cost_curves(results)
    if not curves and not results.of("latency"):
        return section
    batch_sizes = [entry.batch_size for entry in curves if entry.cost.phase]
    smallest = min(batch_sizes, default=1)
    drawn = [entry for entry in curves if entry.cost.phase is None or entry.batch_size == smallest]
    section.pictures = [p for p in (cost_figure(results, entry, output) for entry in drawn) if p]
    if curves and not any(entry.cost.name == "memory" for entry in curves):
        section.notes.append("Peak memory was not recorded on this device.")
    if len(set(batch_sizes)) > 1:
        section.notes.append("Figures show the smallest batch; the tables hold the others.")
    crossings = crossover_table(results, curves)
    if crossings.rows:
        section.tables = [crossings]
    else:
        section.notes.append("Crossovers need the Transformer and another architecture at shared contexts.")
    if results.of("latency"):
        section.folded.append(("Every latency cell", latency_cells_table(results)))
    return section


def _adaptation_section(results: Results) -> Section:
    section = Section(name="adaptation", title="Adaptation to a domain")
    gains, tuning, mixtures = adaptation_table(results), tuning_table(results), mixtures_table(results)
    if gains is None:
        section.notes = ["Gains over the base and over LoRA were not measured in these records."]
    section.tables = [table for table in (gains, tuning) if table]
    section.folded = [("Few-shot mixtures", mixtures)] if mixtures else []
    return section


def _training_section(results: Results, output: Path) -> Section:
    section = Section(name="training", title="Training", absent="Nothing was trained.")
    if results.of("train"):
        section.pictures = training_figures(results, output)
        experts = experts_table(results)
        section.tables = [training_table(results), *([experts] if experts else [])]
    rates = learning_rate_table(results)
    picture = learning_rate_figure(results, output) if rates else None
    section.pictures += [picture] if picture else []
    section.folded = [("Learning-rate search", rates)] if rates else []
    return section
