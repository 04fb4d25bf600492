"""The results of tuning in the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from distaccum.observers.formatting import byte_size, rate
from distaccum.runtime.logs import console
from distaccum.tools.bench.rounds import milliseconds
from distaccum.tools.bench.terminal import print_table, table_of
from distaccum.tools.tune.report import Forecast, TuneReport, TuneRow

_FULL_WIDTH = 110


def line_of(row: TuneRow) -> Text:
    """Returns the line that is printed when a candidate is finished."""
    if row.ratio is None and row.samples_per_second is not None:
        return Text(f"{row.title}: {rate(row.samples_per_second)} samples/s")
    said = row.verdict if row.ratio is None else f"{1 / row.ratio:.2f}× as fast as the best so far, {_verdict(row)}"
    return Text(f"{row.title}: {said}", style="" if row.is_taken else "dim")


def _verdict(row: TuneRow) -> str:
    if row.is_taken:
        return "taken"
    return f"{row.verdict}, not exact" if row.is_inexact and row.ratio is not None else row.verdict


def show(report: TuneReport, run_dir: Path) -> None:
    """Prints a report on the console."""
    _print()
    print_table(_tried(report), _FULL_WIDTH)
    for row in report.rows:
        if row.samples_per_second is None:
            _print(f"{row.title}: {row.verdict}", "yellow")
    _print(
        "speed: against the best before it, both taking turns (on a GPU, its turns before); samples/s vary with what "
        "else the machine does",
        "dim",
    )
    if report.not_tried:
        _print(f"no time was left (tune.minutes) for: {', '.join(report.not_tried)}", "yellow")
    _print()
    for line in _suggestion(report):
        _print(line)
    _print()
    if report.no_forecast is not None:
        _print(f"nothing is predicted: {report.no_forecast}", "yellow")
    if report.forecast is not None:
        _show_forecast(report.forecast)
    _print(f"took {report.seconds:.0f} s; all numbers: {run_dir / 'tune.json'}")


def _print(text: str = "", style: str = "") -> None:
    console.print(Text(text, style), soft_wrap=True)  # commands must stay one line, to be pasted


def _tried(report: TuneReport) -> Table:
    table = table_of("tried", "samples/s", "speed", "middle half", "memory", "", left=(0, 5), folded=(0, 5))
    for row in report.rows:
        if row.samples_per_second is None:
            continue
        speed, spread = "", ""
        if row.ratio and row.low_ratio and row.high_ratio:
            speed, spread = f"{1 / row.ratio:.2f}×", f"{1 / row.high_ratio:.2f}–{1 / row.low_ratio:.2f}"
        style = "" if row.is_taken or row.ratio is None else "dim"
        cells = (rate(row.samples_per_second), speed, spread, byte_size(row.memory or 0), _verdict(row))
        table.add_row(row.title, *cells, style=style)
    return table


def _suggestion(report: TuneReport) -> list[str]:
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
    links = [link.name for link in forecast.links] or [""]
    named = (name or "an update" for name in links)
    table = table_of("ranks", "micro-steps", "window", *named, "samples/s", left=(), folded=())
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
    _print("Predicted time of an update (bright: the configuration's own window); samples/s over the last link:")
    print_table(table, _FULL_WIDTH)
    _print(
        f"from {milliseconds(forecast.fixed_seconds)} an update and {milliseconds(forecast.micro_step_seconds)} a "
        f"micro-step of {forecast.micro_batch:.3g} samples, measured; {byte_size(forecast.sync_bytes)} of gradients in "
        f"{forecast.sync_calls} all-reduce{'s' if forecast.sync_calls > 1 else ''}"
    )
    for link in forecast.links:
        line = f"{link.name}: α {link.latency_seconds * 1e3:.2f} ms, β {link.bytes_per_second / 1e6:,.0f} MB/s"
        if link.measured:
            worst = max(abs(link.fitted[size] / seconds - 1) for size, seconds in link.measured.items())
            sizes = f"{byte_size(min(link.measured))} to {byte_size(max(link.measured))}"
            line += f", fitted to all-reduces of {sizes}, each within {worst:.0%}"
        _print(line)
    if forecast.predicted_seconds and forecast.measured_seconds:
        off = forecast.predicted_seconds / forecast.measured_seconds - 1
        predicted, measured = milliseconds(forecast.predicted_seconds), milliseconds(forecast.measured_seconds)
        _print(f"here: {predicted} predicted, {measured} measured ({off:+.0%})")
