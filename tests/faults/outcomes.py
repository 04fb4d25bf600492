"""What a run has left, to be compared with what another one has."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from command_line import metrics, without_measurements
from starting import RUN, Starter

from distaccum.checkpoints import MODEL_FILE, checkpoints_in


@contextmanager
def current(folder: Path | str) -> Iterator[None]:
    """Makes a folder the current one for a while."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """The run's numbers, but for those that are measured."""
    return [without_measurements(line) for line in metrics(run_dir)]


def outcome(run_dir: Path = Path("run")) -> tuple[list[dict[str, Any]], bytes]:
    """All that a finished run has come to: numbers and weights."""
    return lines(run_dir), (run_dir / MODEL_FILE).read_bytes()


@functools.cache
def undisturbed(runs: Starter, *settings: str, ranks: int = 1) -> tuple[list[dict[str, Any]], bytes]:
    """The outcome of a run that nothing has happened to."""
    with tempfile.TemporaryDirectory() as folder, current(folder):
        ended = runs.run(*RUN, *settings, ranks=ranks)
        assert ended.statuses == [0] * ranks, ended
        return outcome()


def saved_updates(run_dir: Path = Path("run")) -> list[int]:
    """Updates that there are checkpoints of, the newest first."""
    return [int(path.name.removeprefix("update-")) for path in checkpoints_in(run_dir / "checkpoints")]


def leftovers(run_dir: Path = Path("run")) -> list[str]:
    """What was not finished writing, or removing."""
    return [path.name for path in run_dir.rglob(".*")]
