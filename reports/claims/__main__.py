"""Set published figures beside our records: `python -m reports.claims FOLDER ... [--output FILE]`.

The page is in Markdown. It begins with the claims that papers make in a sentence, one row per claim: the
claim, its source, the scale of its experiment, and what was measured here at each size. Then follow the
papers' tables with our columns beside theirs. Nothing is judged, because the scales differ, and the page
says so. Comparisons of kernels (points of the task "kernel", of `python -m harness.peers.kernels`) stand
with the claims that they concern. The page ends with times beside the machine's limits, where they were
measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.record.schema import Point
from reports.claims.ledger import CLAIMS, TABLES, Claim, PublishedTable
from reports.draw.markdown import row_lines, table_lines
from reports.results.load import ReportError, Results, is_number, load
from reports.sections.cost.speed import decode_table
from reports.sections.training.training_speed import training_speed_table

NOT_MEASURED = "not measured"


def page(results: Results) -> str:
    """Return the page in Markdown."""
    sizes = sorted({point.size for point in results.points if point.arch})
    lines = [
        "# Published claims beside these records",
        "",
        f"Sizes measured here: {', '.join(sizes)}. The papers' models are larger or trained on more, on "
        "other text, with other kernels on other cards: a row sets figures side by side, and neither "
        "confirms nor refutes.",
        "",
        *row_lines(
            ("claim", "source", "its scale", "our counterpart", "measured here"),
            [(c.says, c.paper, c.scale, c.ours, measured(c, results, sizes)) for c in CLAIMS],
        ),
        "## Published tables",
        "",
        "Our columns begin with the size they were measured at. –: no figure.",
        "",
    ]
    for table in TABLES:
        lines += published_lines(table, results, sizes)
    for title, measured_table in (
        ("Decode against the bandwidth bound", decode_table(results)),
        ("Training speed", training_speed_table(results)),
    ):
        if measured_table is not None:
            lines += [f"## {title}", "", *table_lines(measured_table)]
    return "\n".join(lines).rstrip() + "\n"


def measured(claim: Claim, results: Results, sizes: Sequence[str]) -> str:
    """Return our figures at every size that has them and those of kernels alone, or that there are none."""
    found = [(size, claim.measure(results, size)) for size in sizes] if claim.measure is not None else []
    shown = [f"{size}: {text}" for size, text in found if text]
    kernels = {name: point for point in results.of("kernel") for name in point.cell.values()}
    shown += [f"{name}: {_kernel(kernels[name])}" for name in claim.kernel_cases if name in kernels]
    return "; ".join(shown) or NOT_MEASURED


def _kernel(point: Point) -> str:
    speed = point.metrics.get("speed")
    if is_number(speed):
        return f"{speed:.2f} times as fast"
    return NOT_MEASURED if point.status == "ok" else point.status


def published_lines(table: PublishedTable, results: Results, sizes: Sequence[str]) -> list[str]:
    """Return the lines of a published table, with each of our columns at every size that has it."""
    archs = [arch for _, arch, _ in table.rows if arch is not None]
    columns: list[tuple[str, dict[str, str]]] = []
    for title, measure in table.measures:
        found = [(size, measure(results, size, archs)) for size in sizes]
        shown = [(f"{size}: {column.title}", column.values) for size, column in found if column is not None]
        columns += shown or [(title, {})]
    rows = [
        (name, *cells, *(values.get(arch or "", NOT_MEASURED) for _, values in columns))
        for name, arch, cells in table.rows
    ]
    return [
        f"### {table.title}",
        "",
        f"Source: {table.paper}. Its scale: {table.scale}. Our counterpart: {table.ours}.",
        "",
        *row_lines((*table.columns, *(title for title, _ in columns)), rows),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Write the page to FILE or the terminal; return 2 where nothing could be read."""
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
