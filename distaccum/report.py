"""A page of one run or of several: `python -m distaccum.report RUN_DIR…`, `distaccum-report`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from distaccum.errors import EXIT_STATUS, UserError, printable
from distaccum.runtime.logs import check_printed, console, make_output_safe, print_error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print_error(f"{message}. Write: {self.prog} RUN_DIR [RUN_DIR …] [--out PAGE.html]")
        sys.exit(EXIT_STATUS)


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script. Exit status: 0, or 2 for bad input."""
    make_output_safe()
    parser = _Parser(
        prog="python -m distaccum.report",
        description="Writes one page that needs nothing else: how one run went, or how several compare.",
        allow_abbrev=False,
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

    try:
        console.print(printable(str(write_page(given.run_dir, given.out))))
        check_printed()
    except UserError as error:
        print_error(str(error))
        sys.exit(EXIT_STATUS)


if __name__ == "__main__":
    main()
