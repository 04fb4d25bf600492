"""Writes the run's numbers as tables, for spreadsheets and data frames."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

from distaccum.observers.base import RunStart
from distaccum.observers.tracker import Row, Tracker
from distaccum.runtime.files import replacing, write_whole

NAMES = {"train": "updates.csv", "eval": "evaluations.csv"}


class CsvTables(Tracker):
    """Writes `csv/updates.csv` and `csv/evaluations.csv` in the run folder: a header and a line per update or
    evaluation, in order.

    Reading a float back gives the same bits; what is not finite is `nan`. A cell is empty where something was not
    measured. A column that comes later (a noise scale, say) is added to the lines before.
    """

    NAME = "csv"

    def __init__(self) -> None:
        super().__init__()
        self._tables: dict[str, _Table] = {}

    def _open(self, run_dir: Path, start: RunStart, history: list[Row]) -> list[Row]:
        folder = run_dir / "csv"
        folder.mkdir(exist_ok=True)
        for group, name in NAMES.items():
            self._tables[group] = _Table(folder / name, [row for row in history if row.group == group])
        return []

    def _write(self, rows: list[Row]) -> None:
        for group, table in self._tables.items():
            table.append([row for row in rows if row.group == group])


class _Table:
    """A file of comma-separated values, whose columns may become more."""

    def __init__(self, path: Path, rows: list[Row]) -> None:
        """Replaces what is there by `rows`."""
        self._path = path
        self._columns = ["update"]
        self._add_columns(rows)
        self._replace(b"".join(map(self._line_of, rows)))

    def _add_columns(self, rows: list[Row]) -> int:
        """Adds columns for what is new in `rows`; returns how many."""
        before = len(self._columns)
        self._columns = list(dict.fromkeys([*self._columns, *(name for row in rows for name in row.values)]))
        return len(self._columns) - before

    def _replace(self, lines: bytes) -> None:
        with replacing(self._path) as file:
            file.write(_line(self._columns) + lines)

    def append(self, rows: list[Row]) -> None:
        if added := self._add_columns(rows):
            _, *lines = self._path.read_bytes().splitlines()
            self._replace(b"".join(line + b"," * added + b"\n" for line in lines))
        with open(self._path, "ab", buffering=0) as file:
            write_whole(file, b"".join(map(self._line_of, rows)))

    def _line_of(self, row: Row) -> bytes:
        cells = row.values | {"update": row.update}
        return _line([_cell(cells[name]) if name in cells else "" for name in self._columns])


def _cell(value: float) -> str:
    return repr(value) if math.isfinite(value) else "nan"


def _line(cells: list[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow([" ".join(cell.split()) for cell in cells])
    return text.getvalue().encode()
