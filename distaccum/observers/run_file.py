"""`run.json`: what a run was and how it ended, in its folder, for programs. Its updates are in `metrics.jsonl`."""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from distaccum.config.redaction import redacted_text
from distaccum.errors import NonfiniteError, OtherRankFailedError, UserError
from distaccum.observers.base import Observer, RunEnd, RunStart
from distaccum.runtime.files import open_regular, write_text

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
_MOST_BYTES = 1 << 20


class Outcome(StrEnum):
    """The ways in which a run ends."""

    running = "running"
    """Not yet; a run that was killed keeps it."""
    finished = "finished"
    stopped = "stopped"
    """It was asked to stop, and goes on when it is started again."""
    diverged = "diverged"
    """A loss or a gradient was not finite."""
    failed = "failed"


@dataclass(kw_only=True, slots=True)
class RunRecord:
    """The content of `run.json`."""

    plan: str = ""
    """How a window is cut, in one line."""
    subject: str = ""
    """The classes of the model and of the training data: `CNN on Digits`."""
    total_updates: int = 0
    resumed_after: list[int] = field(default_factory=list)
    """The updates after which it went on, once for each time that it was started again from a checkpoint."""
    updates: int = 0
    """Updates done when the file was last written: at the start and at the end."""
    skipped_updates: int = 0
    """Those of them whose optimizer step was skipped."""
    outcome: Outcome = Outcome.running
    reason: str | None = None
    """Why it ended: the signal that stopped it, the error that it failed with, or what made it finish early."""

    def write(self, run_dir: Path) -> None:
        """Writes the file, whole or not at all. A file that can't be written is a warning: the run goes on."""
        try:
            write_text(run_dir / RUN_FILE, json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        except OSError as error:
            logger.warning("%s can't be written: %s", run_dir / RUN_FILE, error.strerror or error)

    @classmethod
    def read(cls, run_dir: Path) -> RunRecord | None:
        """Reads the file, which may be a stranger's; None if it is missing or damaged."""
        try:
            with open_regular(run_dir / RUN_FILE, _MOST_BYTES) as file:
                found = json.load(file)
            return cls(
                plan=str(found["plan"]),
                subject=str(found.get("subject", "")),
                total_updates=int(found["total_updates"]),
                resumed_after=[int(update) for update in found["resumed_after"]],
                updates=int(found["updates"]),
                skipped_updates=int(found["skipped_updates"]),
                outcome=Outcome(found["outcome"]),
                reason=None if found["reason"] is None else str(found["reason"]),
            )
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return None


class RunFile(Observer):
    """Writes `run.json` when the run starts and when it ends."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._record = RunRecord()

    def on_start(self, start: RunStart) -> None:
        before = RunRecord.read(self._run_dir) if start.resumed_update else None
        was_finished = before is not None and before.outcome is Outcome.finished
        has_nothing_to_do = was_finished and start.resumed_update >= start.total_updates
        resumed = [start.resumed_update] if start.resumed_update and not has_nothing_to_do else []
        self._record = RunRecord(
            plan=start.plan,
            subject=start.subject,
            total_updates=start.total_updates,
            resumed_after=[*(before.resumed_after if before else ()), *resumed],
            updates=start.resumed_update,
            skipped_updates=start.skipped_updates,
        )
        self._record.write(self._run_dir)

    def on_end(self, end: RunEnd) -> None:
        dataclasses.replace(
            self._record,
            updates=end.updates,
            skipped_updates=end.skipped_updates,
            outcome=Outcome.stopped if end.interrupted else Outcome.finished,
            reason=end.interrupted or end.stopped_early,
        ).write(self._run_dir)


def record_failure(run_dir: Path, error: Exception) -> None:
    """Writes into `run.json` what error ended the run; no reason if it is for another rank to say."""
    reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    dataclasses.replace(
        RunRecord.read(run_dir) or RunRecord(),
        outcome=Outcome.diverged if isinstance(error, NonfiniteError) else Outcome.failed,
        reason=None if isinstance(error, OtherRankFailedError) else redacted_text(reason),
    ).write(run_dir)
