"""Makes the folder of a run, locks it for one job at a time, and finds it again after a restart."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import yaml

from distaccum.checkpoints import checkpoints_in, clear_leftovers, forget_memory, has_memory
from distaccum.config import flat
from distaccum.config.redaction import redacted
from distaccum.errors import UserError
from distaccum.runtime.files import WRITING, opened, read_plain_yaml, without_tilde, write_text

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
UNFINISHED = "unfinished.json"
"""Left by a run that was asked to stop and has saved; launchers start such a run again."""

_LOCK = "run.lock"
_NOTHING_TO_GO_ON_FROM = "with other settings and without a checkpoint to go on from"
_NOT_THE_RUNS_OWN = frozenset(
    ("run_dir", "resume", "resume_override", "checkpoint", "distributed", "wandb", "observers", "device")
)
"""Keys that may differ between a run and its continuation without making it another run."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of a run."""

    path: Path
    is_restart: bool
    """It holds a run that this one goes on with, or starts over if it has saved nothing yet."""


@contextmanager
def held_run_folder(run_dir: str | None, resume: str, plain: dict[str, Any]) -> Iterator[RunFolder]:
    """Makes or finds the run folder and keeps other jobs out of it. To be called on rank 0.

    The folder of a new run has its `config.yaml` then; for a run that goes on, `begin` writes it.

    Args:
        run_dir: the folder, or None for a new one in `runs/`, named by the time.
        resume: as in the configuration.
        plain: the whole configuration.

    Raises:
        UserError: another job is writing in it, it holds the results of another run, or can't be written.
    """
    if run_dir == "":
        raise UserError("run_dir is empty. Name a folder, or leave run_dir out for a new one in runs/.")
    with contextlib.ExitStack() as stack:
        try:
            path = _folder(run_dir)
            refuse_links(path)
            is_relaunch = stack.enter_context(_locked(path)) == _launch() and _is_relaunched()
            clear_leftovers(path / CHECKPOINTS)
            for leftover in path.glob(f".*{WRITING}"):
                leftover.unlink()
            # torchrun has started the same command again: its own results are no reason to refuse it.
            is_restart = _is_restart(path, run_dir, "auto" if is_relaunch else resume, plain)
            folder = RunFolder(path, is_restart)
            if not is_restart:
                forget_memory(path / CHECKPOINTS)
        except OSError as error:
            raise _cannot_write(run_dir if run_dir is not None else "runs", error) from error
        if not folder.is_restart:
            begin(folder, plain)
        yield folder


def begin(folder: RunFolder, plain: dict[str, Any]) -> None:
    """Writes the run's configuration, and removes the mark of an unfinished run.

    For a run that goes on, it is called once that is certain: a run that is refused leaves its folder as it was.

    Raises:
        UserError: the folder can't be written.
    """
    try:
        text = yaml.safe_dump(redacted(plain), sort_keys=False, allow_unicode=True)
        write_text(folder.path / "config.yaml", text)
        (folder.path / UNFINISHED).unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(folder.path, error) from error


def refuse_links(folder: Path, *names: str) -> None:
    """Refuses links in a run folder in the place of what a run makes there: they would lead out of it.

    Args:
        names: of what is looked at; default: all that is in the folder.

    Raises:
        UserError: one is a link.
    """
    for name in names or sorted(os.listdir(folder)):
        if os.path.islink(folder / name):  # False for a name that can be none
            raise UserError(
                f"{folder / name} is a link, and a run folder is neither read nor written through links. Put what it "
                "links to in its place; the run folder itself may be a link."
            )


def _cannot_write(path: str | Path, error: OSError) -> UserError:
    return UserError(
        f"the run folder {path} can't be written: {error.strerror or error}. Choose another with run_dir=…"
    )


def _folder(run_dir: str | None) -> Path:
    if run_dir is not None:
        path = without_tilde(run_dir)
        path.mkdir(parents=True, exist_ok=True)
        return path
    return _folder_before_restart() or _made_anew(Path("runs") / time.strftime("%Y-%m-%d_%H-%M-%S"))


def _folder_before_restart() -> Path | None:
    """Returns the folder that the same torchrun's ranks had before it restarted them."""
    if not _is_relaunched():
        return None
    mine = _launch()
    locks = sorted(Path("runs").glob(f"*/{_LOCK}"), key=lambda lock: lock.parent.name, reverse=True)
    return next((lock.parent for lock in locks if _holder(lock).get("launch") == mine), None)


def _is_relaunched() -> bool:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def _launch() -> str | None:
    """Returns what identifies this start of torchrun; None without torchrun."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    # A static rendezvous calls all of them none; the launcher's own process outlives the ranks that it restarts.
    return f"none {socket.gethostname()} {os.getppid()}" if run_id == "none" else run_id


def _made_anew(path: Path) -> Path:
    """Makes a new folder: `path`, or `path` with a number behind it."""
    for number in itertools.count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}_{number}")
        # Asking first whether it is there would let two runs that start at once take the same one.
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise AssertionError


@contextmanager
def _locked(path: Path) -> Iterator[str | None]:
    """Holds the folder's lock, which the kernel releases when the process ends, in whatever way.

    Yields the launch that held it before.
    """
    before = _holder(path / _LOCK).get("launch")  # opening the file again later would release the lock
    with open(path / _LOCK, "a+", encoding="utf-8", opener=opened) as file:
        _wait_for_lock(file, path)
        file.truncate(0)
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "launch": _launch()}, file)
        file.flush()
        yield before


def _wait_for_lock(file: TextIO, path: Path, patience_seconds: float = 5.0) -> None:
    deadline = time.monotonic() + patience_seconds  # a rank that was just killed may take a moment to be gone
    while True:
        try:
            # Not flock: data-loader workers would inherit it, and outlive a killed rank by some seconds.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if not isinstance(error, BlockingIOError | PermissionError):
                raise
            if time.monotonic() > deadline:
                holder = _holder(path / _LOCK)
                raise UserError(
                    f"run_dir={path} is in use: process {holder.get('pid', '?')} on {holder.get('host', '?')} is "
                    "writing there. Wait for it or stop it, or choose another folder."
                ) from None
            time.sleep(0.2)


def _holder(lock: Path) -> dict[str, Any]:
    return read_plain_yaml(lock) or {}  # JSON is YAML


def _is_restart(path: Path, run_dir: str | None, resume: str, plain: dict[str, Any]) -> bool:
    has_checkpoints = bool(checkpoints_in(path / CHECKPOINTS))
    if not has_checkpoints and not (path / METRICS).exists():
        # A config.yaml alone is what a run leaves that failed before its first update: no reason to refuse.
        return False
    # Whether the states in memory are still there, all nodes say together: see `results_of_another`.
    if resume != "none" and (has_checkpoints or has_memory(path / CHECKPOINTS) or _is_same_run(path, plain)):
        return True
    raise _another_run(run_dir, "which would be overwritten" if resume == "none" else _NOTHING_TO_GO_ON_FROM)


def results_of_another(path: Path, plain: dict[str, Any]) -> UserError | None:
    """Returns the error to raise where a run that goes on has found nothing to go on from, if its settings are others
    than those of the results in its folder."""
    if not (path / METRICS).exists() or _is_same_run(path, plain):
        return None
    return _another_run(path, _NOTHING_TO_GO_ON_FROM)


def _another_run(run_dir: str | Path | None, why: str) -> UserError:
    return UserError(
        f"run_dir={run_dir} holds the results of another run, {why}. Choose another folder, or remove that one."
    )


def _is_same_run(path: Path, plain: dict[str, Any]) -> bool:
    before = read_plain_yaml(path / "config.yaml")
    return before is not None and not changes(before, redacted(plain))


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns the differences of two configurations that make another run: `optim.lr: 0.1 → 0.2`."""
    old, new = flat(before), flat(now)
    keys = [key for key in {**old, **new} if key.partition(".")[0] not in _NOT_THE_RUNS_OWN]
    # As text, because NaN is not equal to itself.
    return [f"{key}: {old.get(key)} → {new.get(key)}" for key in keys if repr(old.get(key)) != repr(new.get(key))]


def leave_marker(path: Path, update: int, signal_name: str) -> None:
    """Marks the run as unfinished, for launchers to start it again."""
    content = {"update": update, "signal": signal_name, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    try:
        write_text(path / UNFINISHED, json.dumps(content) + "\n")
    except OSError as error:
        logger.warning("%s can't be written: %s", path / UNFINISHED, error.strerror or error)
