"""Shows the run on the console: a bar on a terminal, plain lines in a pipe or a batch job's log."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from distaccum.errors import printable
from distaccum.observers.base import EvaluationRecord, Observer, RunEnd, RunStart, UpdateRecord
from distaccum.observers.formatting import byte_size, clock, duration, evaluation_text, noise_text, number, rate, words
from distaccum.runtime import logs

_LABEL_WIDTH = 15
_BAR_WIDTHS = 8, 40
_GAP = 2
_NARROWEST_COLUMN = 20
_ECHO_WIDTH = 2  # A terminal shows ^C behind the bar; on a new line, it would leave a second bar behind.
_REFRESH_SECONDS = 0.1


class Progress(Observer):
    """Shows how far the run is, how it does and how fast it goes, and sums it up at its end.

    The loss shown is that of the last window as it is, not a running average.
    """

    def __init__(self, seconds: float = 2.0, console: Console | None = None) -> None:
        """
        Args:
            seconds: Where there is no terminal: least time between two lines. The first and the last update have
                theirs in any case.
            console: Where to write. None: standard output, together with the package's messages.
        """
        self._seconds = seconds
        self._console = logs.console if console is None else console
        # The second is False on a terminal that cannot redraw a line (TERM=dumb, TTY_INTERACTIVE=0).
        self._on_terminal = self._console.is_terminal and self._console.is_interactive
        self._total_updates = 0
        self._skipped_updates = 0
        self._noise = ""
        self._bar: _Bar | None = None
        self._live: Live | None = None
        self._unprinted: UpdateRecord | None = None
        self._shown_at: float | None = None
        self._first: tuple[int, float] | None = None

    def on_start(self, start: RunStart) -> None:
        self._total_updates = start.total_updates
        self._skipped_updates = start.skipped_updates
        per_epoch = "" if start.updates_per_epoch is None else f" ({start.updates_per_epoch:,} per epoch)"
        rows = [("plan", start.plan), ("updates", f"{start.total_updates:,}{per_epoch}")]
        if start.resumed_update:
            rows.append(("resumed", f"after update {start.resumed_update:,}"))
        self._print_rows([*rows, *_files(start.run_dir)])
        if self._on_terminal:
            self._start_bar(start.resumed_update)

    def _start_bar(self, done: int) -> None:
        self._bar = _Bar(self._total_updates, done)
        self._live = Live(
            self._bar,
            console=self._console,
            # Drawn by the training loop itself. A thread that draws would hold the console's lock at times, and
            # loader workers forked at such a time would inherit it locked.
            auto_refresh=False,
            # Python's prints go above the bar; standard error only where it ends on a terminal too (not in `2> file`).
            redirect_stderr=sys.stderr.isatty(),
        )
        self._live.start(refresh=True)
        # Rich hides the cursor, and a killed run could not bring it back.
        self._console.show_cursor(True)

    def on_update(self, record: UpdateRecord) -> None:
        now = time.monotonic()
        self._skipped_updates += record.skipped
        if record.noise_scale is not None and record.noise_scale_error is not None:
            self._noise = noise_text(record.noise_scale, record.noise_scale_error)
        remaining_seconds = self._remaining_seconds(record, now)
        due_after = self._seconds if self._live is None else _REFRESH_SECONDS
        due = self._shown_at is None or now - self._shown_at >= due_after or record.update >= self._total_updates
        if self._bar is not None and self._live is not None:
            self._bar.show(self._fields(record, remaining_seconds), record.update)
            if due:
                self._live.refresh()
        elif due:
            self._print_update(record, remaining_seconds)
        else:
            self._unprinted = record
        if due:
            self._shown_at = now

    def on_evaluation(self, record: EvaluationRecord) -> None:
        metrics = evaluation_text(record.metrics, record.references)
        line = f"evaluation after update {record.update} (epoch {record.epoch}): {metrics}"
        self._print(Text(self._wrapped(line, column=0, indent=2)))
        if record.sample is not None:
            self._print(Text(self._wrapped(f"sample: {printable(record.sample)}", column=0, indent=2)))

    def on_end(self, end: RunEnd) -> None:
        self.close()
        self._print(Text())
        self._print_rows(_summary(end, self._total_updates, self._noise))

    def close(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()
        record, self._unprinted = self._unprinted, None
        if record is not None:
            self._print_update(record, self._remaining_seconds(record, time.monotonic()))

    def _remaining_seconds(self, record: UpdateRecord, now: float) -> float:
        """Returns the time left at the pace since the first update of this process, evaluations and all.

        The first update itself, which warms things up and may compile, counts only as long as there is no other.
        """
        if self._first is None:
            self._first = record.update, now
        first_update, first_time = self._first
        updates = record.update - first_update
        pace = (now - first_time) / updates if updates else record.update_seconds
        return pace * max(0, self._total_updates - record.update)

    def _fields(self, record: UpdateRecord, remaining_seconds: float) -> dict[str, tuple[str, str]]:
        """Returns the fields shown of an update, in order: a long text and a short one by name (metrics: `metric…`)."""
        speed = rate(record.samples_per_second)
        texts = {
            "count": (_count(record.update, self._total_updates),) * 2,
            "epoch": (f"epoch {record.epoch}",) * 2,
            "loss": (f"loss {number(record.loss)}",) * 2,
        }
        for index, (name, value) in enumerate([*record.metrics.items(), *record.terms.items()]):
            texts[f"metric{index}"] = (f"{words(name)} {number(value, decimals=3)}",) * 2
        if self._skipped_updates:
            texts["skipped"] = (f"{self._skipped_updates:,} skipped",) * 2
        if self._noise:
            texts["noise"] = f"noise scale {self._noise}", f"noise {self._noise}"
        if record.data_wait:
            texts["data"] = f"waits for data {record.data_wait:.0%}", f"data {record.data_wait:.0%}"
        texts["rate"] = f"{speed} samples/s", f"{speed}/s"
        texts["eta"] = (f"ETA {clock(remaining_seconds)}",) * 2
        return texts

    def _print_update(self, record: UpdateRecord, remaining_seconds: float) -> None:
        self._unprinted = None
        fields = self._fields(record, remaining_seconds)
        self._print(Text("update " + (" " * _GAP).join(text for text, _ in fields.values())))

    def _print_rows(self, rows: list[tuple[str, str]]) -> None:
        """Prints two aligned columns; a text too long for a terminal's line goes on beneath itself."""
        for label, value in rows:
            text = Text(f"{label:<{_LABEL_WIDTH}}", style="dim")
            text.append(Text(self._wrapped(value, column=_LABEL_WIDTH, indent=_LABEL_WIDTH), style="not dim"))
            self._print(text)

    def _wrapped(self, text: str, column: int, indent: int) -> str:
        """Returns `text`, which starts at `column`, with line breaks between words for a terminal; none for a pipe.

        A word that is longer than a line, such as a path, stays whole to be copied.
        """
        width = self._console.width
        if not self._on_terminal or width - indent < _NARROWEST_COLUMN:
            return text
        wrapper = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
        # The indent stands for what is on the first line already.
        wrapper.initial_indent, wrapper.subsequent_indent = " " * column, " " * indent
        return wrapper.fill(text)[column:]

    def _print(self, text: Text) -> None:
        # soft_wrap: lines are never broken where a log or `grep` would read them.
        self._console.print(text, soft_wrap=True)


def _count(update: int, total_updates: int) -> str:
    return f"{update:>{len(str(total_updates))}}/{total_updates}"


class _Bar:
    """One line with the bar, and as much beside it as there is room for.

    What has been shortened or left out at some width stays so at that width: otherwise fields would come and go as
    numbers gain and lose a digit.
    """

    def __init__(self, total_updates: int, done: int) -> None:
        self._total_updates = total_updates
        self._done = done
        self._texts: dict[str, tuple[str, str]] = {"count": (_count(done, total_updates),) * 2}
        self._width = 0
        self._cuts = 0

    def show(self, texts: dict[str, tuple[str, str]], done: int) -> None:
        """Takes the state to draw next."""
        self._done = done
        self._texts = texts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(1, options.max_width - _ECHO_WIDTH)
        if width != self._width:
            self._width, self._cuts = width, 0
        versions = list(self._versions())
        self._cuts = min(self._cuts, len(versions) - 1)
        narrowest, widest = _BAR_WIDTHS
        while self._cuts < len(versions) - 1 and _width(versions[self._cuts]) + _GAP + narrowest > width:
            self._cuts += 1
        texts = versions[self._cuts]
        bar_width = min(widest, width - _width(texts) - _GAP)
        line = Text((" " * _GAP).join(texts), no_wrap=True, overflow="crop")
        line.truncate(width)
        if bar_width < narrowest:
            yield line
            return
        bar = ProgressBar(self._total_updates, self._done, bar_width, complete_style="cyan", finished_style="green")
        grid = Table.grid(Column(width=bar_width), Column(no_wrap=True), padding=(0, _GAP, 0, 0))
        grid.add_row(bar, line)
        yield grid

    def _versions(self) -> Iterator[list[str]]:
        """Yields the texts in full, then shorter and shorter ones."""
        yield [long for long, _ in self._texts.values()]
        texts = {name: short for name, (_, short) in self._texts.items()}
        yield list(texts.values())
        metrics = [name for name in texts if name.startswith("metric")]
        for name in (*reversed(metrics[1:]), "epoch", "noise", "data", "rate", *metrics[:1], "skipped", "eta", "loss"):
            if texts.pop(name, None) is not None:
                yield list(texts.values())


def _width(texts: list[str]) -> int:
    return sum(map(len, texts)) + _GAP * (len(texts) - 1)


def _summary(end: RunEnd, total_updates: int, noise: str) -> list[tuple[str, str]]:
    rows = [_how_it_ended(end, total_updates)]
    if end.stopped_early is not None:
        rows.append(("stopped early", end.stopped_early))
    if end.skipped_updates:
        rows.append(("skipped", f"{end.skipped_updates:,} of the updates, whose loss or gradient was not finite"))
    if end.evaluation is not None:
        rows.append(("evaluation", evaluation_text(end.evaluation.metrics, end.evaluation.references)))
    if noise:
        rows.append(("noise scale", f"{noise} samples"))
    shares = {"data": end.data_share, "compute": end.compute_share, "sync": end.sync_share}
    return [
        *rows,
        ("time", f"{duration(end.total_seconds)}, of which training {duration(end.train_seconds)}"),
        *_warm_up(end),
        ("speed", f"{rate(end.samples_per_second)} samples/s"),
        ("training time", ", ".join(f"{name} {100 * share:.1f}%" for name, share in shares.items())),
        ("peak memory", f"{byte_size(end.peak_memory_bytes)} ({end.peak_memory_kind})"),
        *_files(end.run_dir),
    ]


def _warm_up(end: RunEnd) -> list[tuple[str, str]]:
    if not end.warm_up_updates:
        return []
    updates = f"{end.warm_up_updates:,} update{'s' if end.warm_up_updates > 1 else ''}"
    took = f"took {duration(end.warm_up_seconds)}, {duration(end.compile_seconds)} of them to compile"
    apart = "" if end.warm_up_updates == end.updates else "; not in the speed"
    return [("warm-up", f"{updates} {took}{apart}")]


def _how_it_ended(end: RunEnd, total_updates: int) -> tuple[str, str]:
    if end.interrupted is None:
        # Where sizes of windows follow the noise scale, a whole run may have fewer updates than were in sight at first.
        is_known = end.updates == total_updates or end.stopped_early is not None
        of_all = f" of {total_updates:,}" if is_known else ""
        return "finished", f"{end.updates:,}{of_all} updates, {end.samples:,} samples"
    by = "Ctrl-C" if end.interrupted == "SIGINT" else end.interrupted
    saved = "saved; start again with the same command to go on" if end.is_saved else "not saved"
    return "stopped", f"by {by} after update {end.updates:,} of {total_updates:,}; {saved}"


def _files(run_dir: Path | None) -> list[tuple[str, str]]:
    return [] if run_dir is None else [("files", str(run_dir))]
