"""Reading a `metrics.jsonl` back: of a run that is finished, or killed, or still running, by any version."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distaccum.runtime.files import open_regular


@dataclass(kw_only=True, slots=True)
class Metrics:
    """The lines of a run, each update and each evaluation once, in order."""

    updates: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    unreadable: int = 0
    """Lines that are no JSON objects of a run. A last line that was cut off in the middle does not count."""

    @property
    def missing(self) -> int:
        """Updates up to the last one that have no line."""
        return int(self.updates[-1]["update"]) - len(self.updates) if self.updates else 0

    def values(self, key: str) -> list[tuple[float, float]]:
        """Pairs of update and value, of the updates that have the key. `null` is NaN: it was not finite.

        Args:
            key: as in the file; `metrics/accuracy` for one of the task's.
        """
        return _values(self.updates, key)

    def evaluated(self, metric: str) -> list[tuple[float, float]]:
        """The same of the evaluations."""
        return _values(self.evaluations, f"eval/{metric}")

    def evaluation_metrics(self) -> list[str]:
        """Names of the evaluations' metrics, the loss first."""
        names = dict.fromkeys(name for line in self.evaluations for name in line["eval"])
        return sorted(names, key=lambda name: name != "loss")

    def has(self, key: str) -> bool:
        """Whether there is a finite value of it."""
        return any(math.isfinite(value) for _, value in self.values(key))


def _values(lines: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    group, slash, name = key.partition("/")  # the rest may have one too: eval/ema/loss
    if not slash:
        group, name = "", key
    found = []
    for line in lines:
        entries = line.get(group) if group else line
        if isinstance(entries, dict) and name in entries:
            found.append((float(line["update"]), _number(entries[name])))
    return found


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def read_metrics(path: Path) -> Metrics:
    """Reads what can be read.

    Raises:
        OSError: the file can't be read.
    """
    updates: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, dict[str, Any]] = {}
    metrics = Metrics()
    with open_regular(path) as file:
        for line in file:
            entry = parsed(line)
            if entry is None:
                metrics.unreadable += line.endswith(b"\n")
            else:
                # A run that was killed may have done some of its updates twice: the later line is what counts.
                (evaluations if isinstance(entry.get("eval"), dict) else updates)[entry["update"]] = entry
    metrics.updates = [updates[number] for number in sorted(updates)]
    metrics.evaluations = [evaluations[number] for number in sorted(evaluations)]
    return metrics


def parsed(line: bytes) -> dict[str, Any] | None:
    """A line's object, if it is one of a run."""
    try:
        entry = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    is_of_a_run = isinstance(entry, dict) and type(entry.get("update")) is int and entry["update"] >= 0
    return entry if is_of_a_run else None
