"""Prints the comparison: a table, the advice, and where the page is."""

from __future__ import annotations

from pathlib import Path

from rich.text import Text

from distaccum.observers.formatting import byte_size, rate
from distaccum.runtime.logs import console
from distaccum.tools.bench.rounds import milliseconds
from distaccum.tools.bench.terminal import print_paragraphs, print_table, table_of
from distaccum.tools.compare.results import CompareReport, CompareRow, by_axis

TWO_AXES = "Syncs and bytes with two numbers: inside a node + between nodes."
_FULL_WIDTH = 150
_IN_TERMINAL = (1, 2, 3, 4, 7, 8, 9, 10, 11, 12)
"""Columns for a terminal: the page has room for more."""
_MOST_IMPORTANT = (1, 4, 8, 10, 11)
"""Columns for a narrow one: time, speed-up, memory, bytes sent, error."""


def show(report: CompareReport, run_dir: Path) -> None:
    """Prints a report on the console; in a narrow one, the table has the columns that matter most."""
    is_narrow = console.is_terminal and console.width < _FULL_WIDTH
    names = heads(str(report.config["precision"]["name"]))
    shown = _MOST_IMPORTANT if is_narrow else _IN_TERMINAL
    table = table_of("placement", *(names[index] for index in shown))
    for row in report.rows:
        values = cells(row) or ["—"] * len(names)
        table.add_row(row.title, *(values[index] for index in shown), style="" if row.reason is None else "dim")
    console.print()
    print_table(table, _FULL_WIDTH)
    if any(row.sync_by_axis for row in report.measured):
        console.print(Text(TWO_AXES, style="dim"))
    for row in report.rows:
        for problem in filter(None, (row.reason, *row.notes)):
            console.print(Text(f"{row.title}: {problem}", style="yellow"))
    print_paragraphs(report.advice)
    console.print(Text(f"took {report.seconds:.0f} s; the page with the charts: {run_dir / 'compare.html'}"))


def heads(precision: str) -> list[str]:
    """Returns the names of all columns but the first."""
    return [
        "micro-batch", "time", "middle half", "samples/s", "speed-up", "data", "compute", "in sync", "memory", "syncs",
        "sent", "error fp64", f"error {precision}",
    ]  # fmt: skip


def cells(row: CompareRow) -> list[str]:
    """Returns a row's cells, without its name; none if it was not measured.

    Traffic of two axes is a sum: inside a node + between nodes.
    """
    if not row.is_measured:
        return []
    sizes = sorted(set(row.micro_batch_sizes))
    return [
        "" if not sizes else str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}–{sizes[-1]}",
        milliseconds(row.seconds),
        f"{milliseconds(row.low_seconds)} – {milliseconds(row.high_seconds)}",
        rate(row.samples_per_second),
        "—" if row.speedup is None else f"{row.speedup:.2f}×",
        *(f"{share:.0%}" for share in (row.data_share, row.compute_share, row.sync_share)),
        byte_size(row.peak_memory),
        " + ".join(str(calls) for calls, _ in by_axis(row)),
        " + ".join(byte_size(sent) for _, sent in by_axis(row)),
        *("—" if error is None else "0" if error == 0 else f"{error:.1e}" for error in (row.error_float64, row.error)),
    ]
