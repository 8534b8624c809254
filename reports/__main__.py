"""`python -m reports FOLDER [FOLDER ...] [--output DIR]`: renders the report of recorded results."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reports.page.html import render
from reports.results.load import ReportError


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 where nothing could be reported."""
    parser = argparse.ArgumentParser(prog="python -m reports", description=__doc__)
    parser.add_argument("folders", metavar="FOLDER", nargs="+", type=Path, help="holds records/*.jsonl")
    parser.add_argument("--output", metavar="DIR", type=Path, help="default: FOLDER/report of the first")
    options = parser.parse_args(arguments)
    try:
        page = render(options.folders, options.output or options.folders[0] / "report")
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
