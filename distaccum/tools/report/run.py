"""From the folders of runs to the file of the page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from distaccum.errors import UserError, require
from distaccum.runtime.files import write_text
from distaccum.tools.pages import MADE_BY
from distaccum.tools.report.page import page_of
from distaccum.tools.report.runs import read_runs

_NAME = "report.html"


def write_page(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Writes the page of some runs; returns its path.

    Args:
        out: None: `report.html` in the run's folder, or in the current one if there are several runs.

    Raises:
        UserError: a folder holds no run, or the file can't be written or is somebody else's.
    """
    runs = read_runs(folders)
    path = out if out is not None else (folders[0] if len(folders) == 1 else Path()) / _NAME
    if os.path.isdir(path):
        path = path / _NAME
    try:
        if path.is_file() and not path.is_symlink():  # a link is replaced, whatever it leads to
            with path.open("rb") as file:
                is_a_page = MADE_BY.encode() in file.read(1000)
            require(is_a_page, f"{path} exists already and is no page of distaccum: choose another file with --out.")
        write_text(path, page_of(runs))
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}. Choose another with --out.") from error
    return path
