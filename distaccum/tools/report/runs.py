"""Reads runs from their folders, whether they are finished, killed, or still going on."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distaccum.config import flat
from distaccum.config.redaction import redacted
from distaccum.errors import UserError
from distaccum.observers.metrics_reading import Metrics, number_or_nan, read_metrics
from distaccum.observers.run_file import RUN_FILE, Outcome, RunRecord
from distaccum.runtime.files import read_plain_yaml
from distaccum.tools.pages.page import subject_of

METRICS = "metrics.jsonl"


@dataclass(kw_only=True, slots=True)
class Run:
    """A run, as far as it is known."""

    name: str
    """Differs from those of the other runs on the page."""
    path: Path
    config: dict[str, Any]
    """Empty if there is none that can be read."""
    metrics: Metrics
    record: RunRecord | None = None
    """What `run.json` says; None if it is missing or can't be read."""
    problems: list[str] = field(default_factory=list)
    """What could not be read of the folder."""

    @property
    def subject(self) -> str:
        """Returns what was trained on what; the run's name if that is not known."""
        return (self.record.subject if self.record is not None else "") or subject_of(self.config) or self.name

    @property
    def outcome(self) -> Outcome | None:
        """Returns how the run ended; None if that is not known."""
        return self.record.outcome if self.record is not None else None

    @property
    def is_finished(self) -> bool:
        """Whether it came to its end, and was not made longer since."""
        record = self.record
        return record is not None and record.outcome is Outcome.finished and record.updates == self.num_updates

    @property
    def has_failed(self) -> bool:
        return self.outcome in (Outcome.diverged, Outcome.failed)

    @property
    def state(self) -> str:
        """Returns how the run ended, in a word or two."""
        if self.record is None:
            return "end not known"
        if self.record.outcome is Outcome.stopped:
            return f"stopped by {self.record.reason}"
        return self.record.outcome if self.is_finished or self.has_failed else "not finished"

    @property
    def resumed_after(self) -> list[int]:
        """The updates after which it went on, each time that it was started again."""
        return self.record.resumed_after if self.record else []

    @property
    def circumstances(self) -> list[tuple[str, str]]:
        """Facts on where the page's figures come from."""
        facts = [("folder", str(self.path.resolve()))]
        if self.record is not None and self.record.plan:
            facts.append(("cut", self.record.plan))
        if self.resumed_after:
            after = ", ".join(f"{update:,}" for update in self.resumed_after)
            facts.append(("went on", f"from the checkpoint after update {after}"))
        return facts + [("not read", problem) for problem in self.problems]

    @property
    def last(self) -> dict[str, Any]:
        """The last update's line."""
        return self.metrics.updates[-1]

    @property
    def num_updates(self) -> int:
        return int(self.last["update"])

    @property
    def samples(self) -> float:
        return number_or_nan(self.last.get("samples"))

    @property
    def window(self) -> float:
        """Samples of a full window; NaN if not known."""
        return number_or_nan(self.configured("batch.global_batch_size"))

    @property
    def train_seconds(self) -> float:
        """Time in updates; NaN if no update has its time."""
        seconds = self.metrics.finite("update_seconds")
        return sum(seconds) if seconds else math.nan

    @property
    def samples_per_second(self) -> float:
        """The median over the updates; NaN if not known."""
        rates = self.metrics.finite("samples_per_second")
        return statistics.median(rates) if rates else math.nan

    @property
    def shares(self) -> dict[str, float] | None:
        """Shares of the time by the names of `TIME_PARTS`, from 0 to 1; None if they are not known."""
        total = self.train_seconds
        keys = ("data_seconds", "sync_seconds")
        if not total or not all(self.metrics.has(key) for key in keys):
            return None
        data, sync = (sum(self.metrics.finite(key)) / total for key in keys)
        data = min(1.0, data)
        sync = min(1.0 - data, sync)
        return {"data": data, "compute": 1.0 - data - sync, "sync": sync}

    @property
    def peak_memory(self) -> int | None:
        """Bytes, on rank 0; None if not known."""
        found = self.metrics.finite("peak_memory_bytes")
        return int(max(found)) if found else None

    @property
    def skipped(self) -> list[int]:
        """Updates whose optimizer step was left out."""
        return [line["update"] for line in self.metrics.updates if line.get("skipped") is True]

    def configured(self, key: str) -> Any:
        """Returns a value of the configuration by its full key; None if it has none."""
        value: Any = self.config
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def best(self, metric: str) -> tuple[int, float] | None:
        """Returns update and value of the best evaluation by a metric; None if it has no finite value."""
        found = [(int(u), v) for u, v in self.metrics.evaluated(metric) if math.isfinite(v)]
        if not found:
            return None
        sign = 1 if is_better_low(metric) else -1
        return min(found, key=lambda entry: sign * entry[1])


def is_better_low(metric: str) -> bool:
    """Returns whether less of a metric is better, judging by its name."""
    return any(word in metric for word in ("loss", "error", "perplexity", "entropy"))


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads the runs in some folders.

    Raises:
        UserError: one is no folder of a run, has no update yet, or is named twice.
    """
    seen: dict[Path, Path] = {}
    for folder in folders:
        if (before := seen.get(folder.resolve())) is not None:
            raise UserError(f"{folder} and {before} are the same folder: name each run once.")
        seen[folder.resolve()] = folder
    return [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """Returns the folders' own names, with as many of those above them as it takes to make them differ."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("the same folder twice")


def _read(folder: Path, name: str) -> Run:
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is no folder. Give the folder of a run: its last line, `files`, names it.")
    try:
        metrics = read_metrics(folder / METRICS)
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no run: there is no {METRICS} in it. Give the folder that distaccum.train wrote "
            "(run_dir=…, or one of those in runs/)."
        ) from None
    except OSError as error:
        raise UserError(f"{folder / METRICS} can't be read: {error.strerror or error}.") from error
    if not metrics.updates:
        raise UserError(f"{folder / METRICS} holds no update that can be read: there is nothing to show yet.")
    run = Run(name=name, path=folder, config={}, metrics=metrics, record=RunRecord.read(folder))
    run.config = _config(run)
    if run.record is None:
        run.problems.append(f"{RUN_FILE} is missing or can't be read, so it is not known how the run ended")
    if metrics.unreadable:
        run.problems.append(f"{metrics.unreadable} damaged line{'s' * (metrics.unreadable > 1)} of {METRICS} left out")
    if metrics.missing:
        run.problems.append(f"{metrics.missing} update{'s' * (metrics.missing > 1)} without a line in {METRICS}")
    return run


def _config(run: Run) -> dict[str, Any]:
    found = read_plain_yaml(run.path / "config.yaml")
    if found is None:
        run.problems.append("config.yaml is missing or can't be read, so the settings are not known")
        return {}
    plain: dict[str, Any] = redacted(found)  # it is already; what the environment holds now is kept out too
    return plain


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Returns keys of the configuration in which runs differ, with each run's value; keys that all have come first."""
    flats = [flat(run.config) for run in runs]
    keys = dict.fromkeys(key for values in flats for key in values if key not in ("run_dir", "resume", "wandb.name"))
    rows = []
    for key in keys:
        texts = [_text(values[key]) if key in values else "—" for values in flats]
        if len(set(texts)) > 1:
            rows.append((key, texts))
    return sorted(rows, key=lambda row: "—" in row[1])


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
