"""Prints a study: a table, the advice, and where the page is."""

from __future__ import annotations

from pathlib import Path

from rich.text import Text

from distaccum.observers.formatting import byte_size, duration, number
from distaccum.runtime.logs import console
from distaccum.tools.bench.terminal import print_paragraphs, print_table, table_of
from distaccum.tools.study.results import Result, Study

_FULL_WIDTH = 132


def show(study: Study, path: Path) -> None:
    """Prints a study on the console, and where its page is."""
    table = table_of(*heads(study), left=(1, 3), folded=(3,))
    for result in study.results:
        style = "bold" if result.name == study.recommended else "" if result.is_chosen else "dim"
        table.add_row(*cells(result), style=style)
    console.print()
    print_table(table, _FULL_WIDTH)
    print_paragraphs(study.advice)
    console.print(Text(f"the page with the charts: {path / 'study.html'}"), soft_wrap=True)


def heads(study: Study) -> list[str]:
    """Returns the names of the columns."""
    target = "target" if study.target is None else f"{study.metric} {number(study.target)}"
    return ["batch", "rule", "lr", target, "updates", "samples", "time", "best", "noise scale", "memory"]


def cells(result: Result) -> list[str]:
    """Returns a run's cells of the table."""
    spot = result.reached
    return [
        str(result.batch_size),
        " = ".join(result.rules),
        f"{result.lr:.3g}",
        OUTCOMES[result.outcome],
        f"{spot.updates:,.0f}" if spot else "—",
        f"{spot.samples:,.0f}" if spot else "—",
        duration(spot.seconds) if spot else "—",
        "—" if result.best is None else number(result.best),
        "—" if result.noise_scale is None else f"{result.noise_scale:,.0f}",
        "—" if result.peak_memory is None else byte_size(result.peak_memory),
    ]


OUTCOMES = {
    "reached": "reached",
    "limit": "not reached",
    "diverged": "diverged",
    "failed": "failed",
    "missing": "not run to its end",
}
