"""Reads the `metrics.jsonl` of a run that is finished, killed or still running, by any version; and cuts it down to the
lines before the update that a run goes on after."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distaccum.runtime.files import open_regular, replacing, sync


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
        """Returns pairs of update and value, for updates that have the key. `null` is NaN: it was not finite.

        Args:
            key: as in the file; `metrics/accuracy` for one of the task's.
        """
        return _values(self.updates, key)

    def finite(self, key: str) -> list[float]:
        """The values that are finite, without their updates."""
        return [value for _, value in self.values(key) if math.isfinite(value)]

    def evaluated(self, metric: str) -> list[tuple[float, float]]:
        """Returns the same for a metric of the evaluations."""
        return _values(self.evaluations, f"eval/{metric}")

    def evaluation_metrics(self) -> list[str]:
        """Returns the names of the evaluations' metrics, the loss first."""
        names = dict.fromkeys(name for line in self.evaluations for name in line["eval"])
        return sorted(names, key=lambda name: name != "loss")

    def family(self, name: str) -> dict[str, list[tuple[float, float]]]:
        """Returns the values of each member of a family by its name, in the order of their first lines.

        Args:
            name: `lr` or `grad_norm` for parameter groups (`lr/GROUP`), `terms`, or `layers/MEASURE` for blocks, of
                updates; `eval/NAME` for metrics of evaluations that are called `NAME/MEMBER`.
        """
        found: dict[str, list[tuple[float, float]]] = {}
        is_evaluation = name.startswith("eval/")
        for line in self.evaluations if is_evaluation else self.updates:
            members = _below(line["eval"], name.removeprefix("eval/")) if is_evaluation else _members(line, name)
            for member, value in members.items():
                found.setdefault(member, []).append((float(line["update"]), number_or_nan(value)))
        return found

    def has(self, key: str) -> bool:
        """Whether there is a finite value of it."""
        return bool(self.finite(key))


def _values(lines: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    group, slash, name = key.partition("/")  # the rest may have one too: eval/ema/loss
    if not slash:
        group, name = "", key
    found = []
    for line in lines:
        entries = line.get(group) if group else line
        if isinstance(entries, dict) and name in entries:
            found.append((float(line["update"]), number_or_nan(entries[name])))
    return found


def _members(line: dict[str, Any], family: str) -> dict[str, Any]:
    group, _, measure = family.partition("/")
    entries = line.get(group)
    if not isinstance(entries, dict):
        return _below(line, family)
    if not measure:
        return entries
    return {name: values[measure] for name, values in entries.items() if isinstance(values, dict) and measure in values}


def _below(entries: dict[str, Any], name: str) -> dict[str, Any]:
    return {key.removeprefix(f"{name}/"): value for key, value in entries.items() if key.startswith(f"{name}/")}


def number_or_nan(value: Any) -> float:
    """The number that was read; NaN if it is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def read_metrics(path: Path) -> Metrics:
    """Reads all lines that can be read.

    Raises:
        OSError: the file can't be read.
    """
    updates: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, dict[str, Any]] = {}
    metrics = Metrics()
    with open_regular(path) as file:
        for line in file:
            entry = _parsed(line)
            if entry is None:
                metrics.unreadable += line.endswith(b"\n")
            else:
                # A run that was killed may have done some of its updates twice: the later line is what counts.
                (evaluations if isinstance(entry.get("eval"), dict) else updates)[entry["update"]] = entry
    metrics.updates = [updates[number] for number in sorted(updates)]
    metrics.evaluations = [evaluations[number] for number in sorted(evaluations)]
    return metrics


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    is_of_a_run = isinstance(entry, dict) and type(entry.get("update")) is int and entry["update"] >= 0
    return entry if is_of_a_run else None


@dataclass(kw_only=True, slots=True)
class KeptLines:
    """The findings of `keep_lines`."""

    unreadable: list[int] = field(default_factory=list)
    """Numbers, from 1, of lines among those kept that are no JSON objects with an update; they were dropped."""
    repeated: int = 0
    """Number of lines whose subject a later line has too; they were dropped."""
    missing: list[tuple[int, int]] = field(default_factory=list)
    """First and last of updates in a row that have no line."""
    last_evaluated: int = -1
    """The last update with an evaluation; -1 if there is none."""


def keep_lines(source: Path | None, target: Path, last_update: int) -> KeptLines:
    """Makes `target` hold the lines of `source` about updates and evaluations up to `last_update`.

    Each once, in order, byte for byte. At any moment `target` is as it was or as it is to be.

    Args:
        source: May be the same file; None, or a file that is not there, for no lines.
        last_update: 0 for none.

    Raises:
        OSError: one of the files can't be read or written.
    """
    kept = KeptLines()
    content = b""
    if source is not None and source.exists():
        with open_regular(source) as file:
            content = file.read()
    lines = _wanted(content, last_update, kept)
    # Sorted, an update comes before its evaluation.
    wanted = b"".join(lines[key] for key in sorted(lines))
    kept.missing = _gaps(sorted(update for update, is_evaluation in lines if not is_evaluation), last_update)
    kept.last_evaluated = max((update for update, is_evaluation in lines if is_evaluation), default=-1)
    if source is None or source != target or target.is_symlink() or not content.startswith(wanted):
        with replacing(target) as writing:
            writing.write(wanted)
    elif len(wanted) != len(content):
        # What is to stay is how the file begins: cutting it takes no room, and there may be none.
        os.truncate(target, len(wanted))
        sync(target)
    return kept


def _wanted(content: bytes, last_update: int, kept: KeptLines) -> dict[tuple[int, bool], bytes]:
    """Returns the lines to keep, by the update and whether they are of its evaluation."""
    lines: dict[tuple[int, bool], bytes] = {}
    unreadable = []
    last_wanted = 0
    for number, line in enumerate(content.split(b"\n"), start=1):
        entry = _parsed(line)
        if entry is None:
            unreadable.append(number)
        elif entry["update"] <= last_update:
            key = entry["update"], "eval" in entry
            kept.repeated += key in lines
            lines[key] = line + b"\n"
            last_wanted = number
    # What comes after is dropped in any case: half a line of a killed run, zeros after a power cut.
    kept.unreadable = [number for number in unreadable if number < last_wanted]
    return lines


def _gaps(updates: Iterable[int], last_update: int) -> list[tuple[int, int]]:
    gaps = []
    expected = 1
    for update in (*updates, last_update + 1):
        if update > expected:
            gaps.append((expected, update - 1))
        expected = update + 1
    return gaps
