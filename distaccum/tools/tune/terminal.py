"""What was tried, suggested and predicted, in the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distaccum.observers.formatting import byte_size, rate
from distaccum.runtime.logs import console
from distaccum.tools.bench.rounds import milliseconds
from distaccum.tools.tune.report import Forecast, Report, Row

_FULL_WIDTH = 110


def line_of(row: Row) -> Text:
    """A row as it is told when it is done."""
    if row.ratio is None and row.samples_per_second is not None:
        return Text(f"{row.title}: {rate(row.samples_per_second)} samples/s")
    said = row.verdict if row.ratio is None else f"{1 / row.ratio:.2f}× as fast as the best so far, {_verdict(row)}"
    return Text(f"{row.title}: {said}", style="" if row.is_taken else "dim")


def _verdict(row: Row) -> str:
    if row.is_taken:
        return "taken"
    return f"{row.verdict}, not exact" if row.is_inexact and row.ratio is not None else row.verdict


def show(report: Report, run_dir: Path) -> None:
    """Prints a report on the console."""
    _print()
    _print_table(_tried(report))
    for row in report.rows:
        if row.samples_per_second is None:
            _print(Text(f"{row.title}: {row.verdict}", style="yellow"))
    _print(
        Text(
            "speed: against the best before it, both taking turns (on a GPU, its turns before); samples/s vary with "
            "what else the machine does",
            "dim",
        )
    )
    if report.not_tried:
        _print(Text(f"no time was left (tune.minutes) for: {', '.join(report.not_tried)}", style="yellow"))
    _print()
    for line in _suggestion(report):
        _print(Text(line))
    _print()
    if report.no_forecast is not None:
        _print(Text(f"nothing is predicted: {report.no_forecast}", style="yellow"))
    if report.forecast is not None:
        _show_forecast(report.forecast)
    _print(Text(f"took {report.seconds:.0f} s; all numbers: {run_dir / 'tune.json'}"))


def _print(text: Text | None = None) -> None:
    # Whatever is to be pasted is never broken.
    console.print(text if text is not None else Text(), soft_wrap=True)


def _print_table(table: Table) -> None:
    # A file or a pipe has no width: the table takes what it needs.
    (console if console.is_terminal else Console(width=_FULL_WIDTH)).print(table)


def _tried(report: Report) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tried", overflow="fold")
    for head in ("samples/s", "speed", "middle half", "memory"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("")
    for row in report.rows:
        if row.samples_per_second is None:
            continue
        has_ratio = row.ratio and row.low_ratio and row.high_ratio
        table.add_row(
            row.title,
            rate(row.samples_per_second),
            f"{1 / row.ratio:.2f}×" if has_ratio and row.ratio else "",
            f"{1 / row.high_ratio:.2f}–{1 / row.low_ratio:.2f}"
            if has_ratio and row.high_ratio and row.low_ratio
            else "",
            byte_size(row.memory or 0),
            _verdict(row),
            style="" if row.is_taken or row.ratio is None else "dim",
        )
    return table


def _suggestion(report: Report) -> list[str]:
    found = report.confirmation
    if found is None:
        return ["Nothing that was tried is faster: the configuration stays as it is."]
    turns = f"{1 / found.ratio:.2f}× as fast ({1 / found.high_ratio:.2f}–{1 / found.low_ratio:.2f} in the middle half)"
    if not found.is_faster:
        return [
            f"What came out of it is {turns} as the configuration as it is, when both take turns once more: that is no "
            "gain to rely on. The configuration stays as it is."
        ]
    return [
        f"Suggested: {' '.join(report.suggestion)}",
        f"confirmed against the configuration as it is: {turns}, {milliseconds(found.seconds)} instead of "
        f"{milliseconds(found.default_seconds)} an update",
        report.train_command,
    ]


def _show_forecast(forecast: Forecast) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("ranks", "micro-steps", "window"):
        table.add_column(head, justify="right", no_wrap=True)
    links = [link.name for link in forecast.links] or [""]
    for name in links:
        table.add_column(name or "an update", justify="right", no_wrap=True)
    table.add_column("samples/s", justify="right", no_wrap=True)
    for prediction in forecast.predictions:
        seconds = [prediction.seconds[name] for name in links]
        table.add_row(
            str(prediction.world_size),
            str(prediction.micro_steps),
            f"{prediction.window:,}",
            *map(milliseconds, seconds),
            rate(prediction.window / seconds[-1]),
            style="" if prediction.is_own_window else "dim",
        )
    _print(Text("Predicted time of an update (bright: the configuration's own window); samples/s over the last link:"))
    _print_table(table)
    _print(
        Text(
            f"from {milliseconds(forecast.fixed_seconds)} an update and {milliseconds(forecast.micro_step_seconds)} a "
            f"micro-step of {forecast.micro_batch:.3g} samples, measured; {byte_size(forecast.sync_bytes)} "
            f"of gradients in {forecast.sync_calls} all-reduce{'s' if forecast.sync_calls > 1 else ''}"
        )
    )
    for link in forecast.links:
        line = f"{link.name}: α {link.latency_seconds * 1e3:.2f} ms, β {link.bytes_per_second / 1e6:,.0f} MB/s"
        if link.measured:
            worst = max(abs(link.fitted[size] / seconds - 1) for size, seconds in link.measured.items())
            sizes = f"{byte_size(min(link.measured))} to {byte_size(max(link.measured))}"
            line += f", fitted to all-reduces of {sizes}, each within {worst:.0%}"
        _print(Text(line))
    if forecast.predicted_seconds and forecast.measured_seconds:
        off = forecast.predicted_seconds / forecast.measured_seconds - 1
        _print(
            Text(
                f"here: {milliseconds(forecast.predicted_seconds)} predicted, "
                f"{milliseconds(forecast.measured_seconds)} measured ({off:+.0%})"
            )
        )
