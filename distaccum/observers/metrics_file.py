"""Writes the run's numbers as JSON Lines, for scripts."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from distaccum.config.basics import finite
from distaccum.errors import UserError
from distaccum.observers.base import EvaluationRecord, Observer, RunEnd, RunStart, UpdateRecord
from distaccum.observers.metrics_reading import KeptLines, keep_lines
from distaccum.runtime.files import LineFile

logger = logging.getLogger(__name__)


class MetricsFile(Observer):
    """Writes `metrics.jsonl`: one line per update and per evaluation, each a strict JSON object.

    Floats are written so that reading them back gives the same bits; NaN and infinities, which JSON lacks, are `null`.
    Each line is handed to the operating system at once, so that a killed run keeps what it wrote.

    A run that goes on after update n keeps the lines up to n as they are, each once and in order, and nothing else:
    updates after n are done again. What a killed run left of its last line goes too. Lines up to n that are missing are
    named in a warning, and so are lines that can't be read.

    While the disk is full, lines wait in memory. Only lines that are still waiting when the run has come to its end
    are an error.
    """

    def __init__(self, run_dir: Path, *, continues: bool = False, start_from: Path | None = None) -> None:
        """
        Args:
            run_dir: The run folder.
            continues: A `metrics.jsonl` in the folder is this run's own, even if no update of it was saved: without
                it, a run that starts at its first update refuses the folder.
            start_from: Folder of another run, from whose checkpoint this one goes on in a folder of its own: its lines
                come first. What is in `run_dir` already goes before it, if `continues`.
        """
        self.path = run_dir / "metrics.jsonl"
        self._continues = continues
        if start_from is None or start_from.resolve() == run_dir.resolve():
            self._start_from = None
        else:
            self._start_from = start_from / self.path.name
        self._file: LineFile | None = None
        self._last_evaluated = -1
        self._ended = False

    def on_start(self, start: RunStart) -> None:
        try:
            there = self.path.exists()
            if there and not self._continues and (start.resumed_update == 0 or self._start_from is not None):
                raise self._refusal()
            source = self.path if there else self._start_from
            if start.resumed_update > 0 or there:
                kept = keep_lines(source, self.path, start.resumed_update)
                self._last_evaluated = kept.last_evaluated
                self._warn(kept, source, start.resumed_update)
            # The numbers of another run are never written over, not even if it started a moment ago.
            self._file = LineFile(self.path, new=start.resumed_update == 0 and not there)
        except FileExistsError:
            raise self._refusal() from None
        except OSError as error:
            raise UserError(
                f"Cannot write {self.path}: {error.strerror or error}. Free the disk, or choose another run_dir."
            ) from error

    def _refusal(self) -> UserError:
        return UserError(
            f"{self.path} exists already: it holds another run's numbers. "
            "Give this run a folder of its own with run_dir=…."
        )

    def _warn(self, kept: KeptLines, source: Path | None, last_update: int) -> None:
        if kept.unreadable:
            numbers = _shown([(number, number) for number in kept.unreadable])
            logger.warning("%s: these lines were no JSON objects of a run, and are dropped: %s", source, numbers)
        if kept.repeated:
            logger.warning("%s: %d lines came twice; the later ones are kept", source, kept.repeated)
        if kept.missing:
            count = sum(last - first + 1 for first, last in kept.missing)
            logger.warning(
                "%s lacks lines of updates that were done before, %d of %d: %s",
                source or self.path,
                count,
                last_update,
                _shown(kept.missing),
            )

    def on_update(self, record: UpdateRecord) -> None:
        line = record.known()
        for key in ("skipped", "compile_seconds", "terms"):
            if not line[key]:
                del line[key]
        self._write(line)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        # A checkpoint may have been made between an update and its evaluation, which then comes again.
        if record.update > self._last_evaluated:
            sample = {} if record.sample is None else {"sample": record.sample}
            self._write({"update": record.update, "epoch": record.epoch, "eval": record.metrics, **sample})

    def on_end(self, end: RunEnd) -> None:
        # A run that is to be started again must not end as one that was given bad input.
        self._ended = end.interrupted is None

    def close(self) -> None:
        """Writes the lines that had to wait.

        Raises:
            UserError: there is still no room, although the run has come to its end. If it ends with an error or is to
                be started again, this is only logged.
        """
        file, self._file = self._file, None
        error = file.close() if file is not None else None
        if file is None or error is None:
            return
        lost = f"its last {len(file.pending)} lines are lost" if file.pending else "its last lines may be lost"
        message = (
            f"{self.path} is not complete, {lost}: {error.strerror or error}. The training itself has lost nothing. "
            "Free the disk before the next run, or choose another run_dir."
        )
        if self._ended:
            raise UserError(message) from error
        logger.error("%s", message)

    def _write(self, line: dict[str, Any]) -> None:
        assert self._file is not None, "on_start comes first"
        self._file.append(json.dumps(finite(line), allow_nan=False))


def _shown(ranges: list[tuple[int, int]], at_most: int = 10) -> str:
    """Formats ranges of numbers: `3, 7-9, 12`."""
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in ranges[:at_most]]
    return ", ".join(texts) + (", …" if len(ranges) > at_most else "")
