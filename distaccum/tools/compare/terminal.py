"""The comparison in the terminal: a table, the advice, and where the rest is."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distaccum.observers.formatting import byte_size, rate
from distaccum.runtime.logs import console
from distaccum.tools.bench.rounds import milliseconds
from distaccum.tools.compare.report import Report
from distaccum.tools.compare.results import Row

_FULL_WIDTH = 150
_MOST_IMPORTANT = (0, 3, 5, 7, 8)
"""Columns for a narrow terminal: time, speed-up, memory, bytes sent, error."""


def show(report: Report, run_dir: Path) -> None:
    """Prints a report on the console; in a narrow one, the table has the columns that matter most."""
    is_narrow = console.is_terminal and console.width < _FULL_WIDTH
    heads = _heads(str(report.config["precision"]["name"]))
    shown = [index for index in range(len(heads)) if not is_narrow or index in _MOST_IMPORTANT]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("placement", overflow="fold")
    for index in shown:
        table.add_column(heads[index], justify="right", no_wrap=True)
    for row in report.rows:
        values = cells(row)
        table.add_row(row.title, *(values[index] for index in shown), style="" if row.reason is None else "dim")
    console.print()
    # A file or a pipe has no width: the table takes what it needs.
    (console if console.is_terminal else Console(width=_FULL_WIDTH)).print(table)
    for row in report.rows:
        if row.reason is not None:
            console.print(Text(f"{row.title}: {row.reason}", style="yellow"))
        for note in row.notes:
            console.print(Text(f"{row.title}: {note}", style="yellow"))
    for paragraph in report.advice:
        console.print()
        console.print(Text(paragraph), soft_wrap=not console.is_terminal)
    console.print()
    console.print(Text(f"took {report.seconds:.0f} s; the page with the charts: {run_dir / 'compare.html'}"))


def _heads(precision: str) -> list[str]:
    return [
        "time",
        "middle half",
        "samples/s",
        "speed-up",
        "in sync",
        "memory",
        "syncs",
        "sent",
        "error fp64",
        f"error {precision}",
    ]


def cells(row: Row) -> list[str]:
    """What the table says of a row beside its name."""
    if row.reason is not None or row.seconds is None or row.low_seconds is None or row.high_seconds is None:
        return ["—"] * len(_heads(""))
    return [
        milliseconds(row.seconds),
        f"{milliseconds(row.low_seconds)} – {milliseconds(row.high_seconds)}",
        rate(row.samples_per_second or 0.0),
        "—" if row.speedup is None else f"{row.speedup:.2f}×",
        "—" if row.sync_share is None else f"{row.sync_share:.0%}",
        "—" if row.peak_memory is None else byte_size(row.peak_memory),
        str(row.sync_calls),
        byte_size(row.sync_bytes or 0),
        error_text(row.error_float64),
        error_text(row.error),
    ]


def error_text(error: float | None) -> str:
    """An error as it stands in a table."""
    return "—" if error is None else "0" if error == 0 else f"{error:.1e}"
