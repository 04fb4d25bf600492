"""The run's numbers as JSON Lines, for scripts."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any, TextIO

from distaccum.errors import UserError
from distaccum.observers.base import EvaluationRecord, Observer, RunStart, UpdateRecord


class MetricsFile(Observer):
    """Writes `metrics.jsonl`: one line per update and per evaluation, each a strict JSON object.

    Floats are written so that reading them back gives the same bits; NaN and infinities, which JSON lacks, are `null`.
    Each line is handed to the operating system at once, so that a killed run keeps what it wrote.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "metrics.jsonl"
        self._file: TextIO | None = None

    def on_start(self, start: RunStart) -> None:
        try:
            # Mode "x": the numbers of an earlier run are never written over.
            self._file = self.path.open("x", encoding="utf-8", newline="\n", buffering=1)
        except FileExistsError:
            raise UserError(
                f"{self.path} exists already: it holds another run's numbers. "
                "Give this run a folder of its own with run_dir=…."
            ) from None
        except OSError as error:
            raise self._failure(error) from error

    def on_update(self, record: UpdateRecord) -> None:
        line: dict[str, Any] = {
            "update": record.update,
            "epoch": record.epoch,
            "samples": record.samples,
            "loss": record.loss,
            "grad_norm": record.grad_norm,
            "lr": record.lr,
            "micro_steps": record.micro_steps,
            "weight": record.weight,
            "update_seconds": record.update_seconds,
            "samples_per_second": record.samples_per_second,
            "sync_calls": record.sync_calls,
            "sync_bytes": record.sync_bytes,
            "metrics": record.metrics,
            "data_seconds": record.data_seconds,
            "sync_seconds": record.sync_seconds,
        }
        if record.skipped:
            line["skipped"] = True
        self._write(line)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self._write({"update": record.update, "epoch": record.epoch, "eval": record.metrics})

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()  # network file systems may report a full disk only here
            except OSError as error:
                raise self._failure(error) from error

    def _write(self, line: dict[str, Any]) -> None:
        assert self._file is not None, "on_start comes first"
        text = json.dumps(_without_nonfinite(line), allow_nan=False)
        try:
            self._file.write(text + "\n")
        except OSError as error:
            # Closing would try to write the rest of the line once more, and fail once more: this error says it all.
            file, self._file = self._file, None
            with contextlib.suppress(OSError):
                file.close()
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> UserError:
        return UserError(
            f"Cannot write {self.path}: {error.strerror or error}. Free the disk, or choose another run_dir."
        )


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
