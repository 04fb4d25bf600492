"""Writes a page of one run or of several: `python -m distaccum.report RUN_DIR…`, `distaccum-report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distaccum.cli import Parser, leave, outcome_of
from distaccum.errors import printable
from distaccum.runtime.logs import console, make_output_safe


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command. Exit status: 0, or 2 for bad input."""
    make_output_safe()
    parser = Parser(
        "report",
        "RUN_DIR [RUN_DIR …] [--out PAGE.html]",
        "Writes one page that needs nothing else: how one run went, or how several compare.",
    )
    parser.add_argument("run_dir", nargs="+", type=Path, metavar="RUN_DIR", help="the folder of a run")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PAGE.html",
        help="where to write it (default: report.html, in the run's folder if it is one, else here)",
    )
    given = parser.parse_args(arguments)
    # Here and not above: --help and a mistake on the command line shouldn't wait for it.
    from distaccum.tools.report import write_page

    leave(outcome_of(lambda: console.print(printable(str(write_page(given.run_dir, given.out))))) or 0)


if __name__ == "__main__":
    main()
