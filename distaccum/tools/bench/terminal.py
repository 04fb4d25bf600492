"""Prints what the tools have in common: a progress bar, tables, and paragraphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from distaccum.runtime.logs import console


def progress_bar(*columns: ProgressColumn) -> Progress:
    """Returns a progress bar: the task, the bar, more columns, and the time."""
    shown = (TextColumn("{task.description}"), BarColumn(), *columns, TimeElapsedColumn())
    return Progress(*shown, console=console, transient=True)


@contextmanager
def status_line(verb: str, *, is_shown: bool = True) -> Iterator[Callable[[str], None]]:
    """Shows on standard error, if that is a terminal, what a tool is doing while the context is open.

    Yields:
        The function to call with what is done from then on.
    """
    errors = Console(stderr=True)
    columns = TextColumn(f"{verb}: {{task.description}}"), TimeElapsedColumn()
    with Progress(*columns, console=errors, transient=True, disable=not (is_shown and errors.is_terminal)) as progress:
        task = progress.add_task("starting", total=None)
        yield lambda doing: progress.update(task, description=doing, refresh=True)


def table_of(*heads: str, left: tuple[int, ...] = (0,), folded: tuple[int, ...] = (0,)) -> Table:
    """Returns a table without lines.

    Args:
        left: indices of the columns of text; the others are of numbers.
        folded: indices of columns that may take several lines.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, head in enumerate(heads):
        is_text, is_folded = index in left, index in folded
        table.add_column(head, justify="left" if is_text else "right", no_wrap=not is_folded, overflow="fold")
    return table


def print_table(table: Table, full_width: int) -> None:
    """Prints a table; in a file or a pipe, which has no width, it takes what it needs."""
    (console if console.is_terminal else Console(width=full_width)).print(table)


def print_paragraphs(paragraphs: Iterable[str]) -> None:
    """Prints paragraphs with an empty line around each; in a file, each is one line."""
    for paragraph in paragraphs:
        console.print()
        console.print(Text(paragraph), soft_wrap=not console.is_terminal)
    console.print()
