"""Gives the ready-made trackers what they have in common: names of the numbers, and each update once after a resume."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distaccum.errors import UserError
from distaccum.observers.background import Background
from distaccum.observers.base import EvaluationRecord, Observer, RunEnd, RunStart, UpdateRecord
from distaccum.observers.flattening import flattened
from distaccum.observers.metrics_reading import number_or_nan, read_metrics

_SECONDS_TO_END = 30.0
"""Time for a tracker to take the rest at the end of a run."""


@dataclass(frozen=True, slots=True)
class Row:
    """The numbers of one update, or of one evaluation."""

    update: int
    group: str
    """`train` or `eval`."""
    values: dict[str, float]
    sample: str | None = None
    """A text of an evaluation's."""

    def named(self) -> dict[str, float]:
        """Returns the numbers by their names under the group: `train/loss`."""
        return {f"{self.group}/{name}": value for name, value in self.values.items()}


class Tracker(Observer, ABC):
    """Writes the numbers of updates (`train/…`) and evaluations (`eval/…`), over the number of the update, for a
    program that shows them. What can't start is an error; afterwards a thread writes, and if it fails or hangs, a
    warning says so, and the training goes on.

    A run that goes on after update n has each update once: what the tracker has of later ones is dropped, and what it
    lacks of earlier ones comes from the run's `metrics.jsonl`, with NaN for what was not finite.
    """

    NAME: str
    """As configured: `observers=NAME`."""

    def __init__(self) -> None:
        self._last_evaluated = -1
        self._end: RunEnd | None = None
        self._waiting: deque[Row] = deque()
        self._background: Background | None = None

    @abstractmethod
    def _open(self, run_dir: Path, start: RunStart, history: list[Row]) -> list[Row]:
        """Opens the tracker, and drops what is not of the run.

        Args:
            history: rows of the updates that were done before and of their evaluations, in order.

        Returns:
            Those of them that are still to be written.
        """

    @abstractmethod
    def _write(self, rows: list[Row]) -> None:
        """Writes rows, in the thread."""

    def _close(self, end: RunEnd | None) -> None:
        """Called last, in the thread. `end`: None for a run that failed."""

    def on_start(self, start: RunStart) -> None:
        if start.run_dir is None:
            raise UserError(f"observers={self.NAME} writes into the folder of the run, and this run has none.")
        try:
            history = _history(start.run_dir / "metrics.jsonl", start.resumed_update)
            missing = self._open(start.run_dir, start, history)
        except ImportError as error:
            raise UserError(
                f"observers={self.NAME} needs a package that cannot be imported ({error}): pip install "
                f'"distaccum[{self.NAME}]", or leave {self.NAME} out of observers.'
            ) from error
        except Exception as error:  # whatever a tracker's package raises
            said = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
            raise UserError(
                f"observers={self.NAME} cannot start: {said}. Mend that, or leave {self.NAME} out of observers."
            ) from error
        self._last_evaluated = max((row.update for row in history if row.group == "eval"), default=-1)
        self._background = Background(self.NAME)
        self._log(missing)

    def on_update(self, record: UpdateRecord) -> None:
        self._log([Row(record.update, "train", _numbers(flattened(record.known())))])

    def on_evaluation(self, record: EvaluationRecord) -> None:
        # A checkpoint may have been made between an update and its evaluation, which then comes again.
        if record.update > self._last_evaluated:
            self._log([Row(record.update, "eval", _numbers(record.metrics), record.sample)])

    def _log(self, rows: Iterable[Row]) -> None:
        assert self._background is not None, "on_start comes first"
        if not self._background.is_lost:
            self._waiting.extend(rows)
            self._background.later(self._write_waiting)

    def _write_waiting(self) -> None:
        """Writes all that waits at once: a tracker that is slower than the training then keeps up with it."""
        if rows := [self._waiting.popleft() for _ in range(len(self._waiting))]:
            self._write(rows)

    def on_end(self, end: RunEnd) -> None:
        self._end = end

    def close(self) -> None:
        background, self._background = self._background, None
        if background is not None:
            background.later(lambda: self._close(self._end))
            if not background.end(_SECONDS_TO_END):
                background.lose(f"it has not ended within {_SECONDS_TO_END:g} s; a resume fills in what is missing")


def _history(path: Path, last_update: int) -> list[Row]:
    """Returns the rows of a `metrics.jsonl`, an update before its evaluation; none for a new run."""
    if last_update == 0:
        return []
    metrics = read_metrics(path)
    rows = [Row(line["update"], "train", _numbers(flattened(line))) for line in metrics.updates]
    rows += [
        Row(line["update"], "eval", _numbers(line["eval"]), str(line["sample"]) if "sample" in line else None)
        for line in metrics.evaluations
    ]
    return sorted((row for row in rows if row.update <= last_update), key=lambda row: (row.update, row.group == "eval"))


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Returns values as numbers of Python; a task's metrics may be NumPy's."""
    return {
        name: value if isinstance(value, int) else number_or_nan(value if value is None else float(value))
        for name, value in values.items()
    }
