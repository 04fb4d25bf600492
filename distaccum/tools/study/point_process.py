"""Runs one training of a study in processes of its own, until it has reached the target or its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from distaccum.config import TrainConfig
from distaccum.tools.bench.portable import to_portable
from distaccum.tools.bench.processes import has_ended, log_of, start_worker
from distaccum.tools.study.curves import Learning

_LOOK_SECONDS = 0.25
_SHARE_OF_LOOKING = 0.05
"""Reading how far a long run is takes time: no more than this part of it."""
_STOP_SECONDS = 60.0
"""How long a run may take to save and end."""


class PointFailedError(Exception):
    """A run ended with an error; the message is its own."""


def run(
    config: TrainConfig,
    look: Callable[[], Learning],
    is_enough: Callable[[Learning], bool],
    *,
    ranks: int,
    threads: int,
    log: Path,
) -> Learning:
    """Runs a training until it has learned enough or is at its end; returns how far it came.

    It goes on from its checkpoint, if there is one. However this ends, no process is left, and the run has saved.

    Args:
        look: reads how far it has come.
        is_enough: whether it may stop there.
        log: the file for all output of the processes.

    Raises:
        PointFailedError: it ended with an error.
    """
    assert config.run_dir is not None
    with tempfile.TemporaryDirectory(prefix="distaccum-") as folder:
        process = start_worker(
            "distaccum.tools.study.worker",
            {"config": to_portable(config)},
            Path(folder),
            num_processes=ranks,
            threads=threads,
            log=log,
            is_apart=True,  # the study itself has the run save and end
        )
        try:
            has_stopped = _watch(process, look, is_enough)
        finally:
            _stop(process)
    if has_stopped:
        # It asks to be started again, but the study has what it needs of it.
        (Path(config.run_dir) / "unfinished.json").unlink(missing_ok=True)
    elif process.returncode != 0:
        raise PointFailedError(_reason(log, process.returncode))
    return look()


def _watch(
    process: subprocess.Popen[bytes], look: Callable[[], Learning], is_enough: Callable[[Learning], bool]
) -> bool:
    """Waits for the end of a run, or ends it when it has learned enough; returns whether it did that."""
    pause = _LOOK_SECONDS
    while not has_ended(process, pause):
        began = time.monotonic()
        if is_enough(look()):
            _stop(process)
            return True
        pause = max(_LOOK_SECONDS, (time.monotonic() - began) / _SHARE_OF_LOOKING)
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Has a run save and end, if it is still running."""
    if process.poll() is not None:
        return
    process.terminate()
    if not has_ended(process, _STOP_SECONDS):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _reason(log: Path, status: int) -> str:
    """Returns why a run failed: its own message, else the last exception."""
    lines = [line.strip() for line in log_of(log).splitlines()]
    said = [line.partition("error: ")[2] for line in lines if line.startswith("error: ") or "]:error: " in line]
    raised = [line for line in lines if "Error: " in line and "ChildFailedError" not in line]
    found = said[-1:] or raised[-1:]
    if found:
        return found[0][:400]
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"it was killed by {signal.Signals(-status).name}"
    return f"it ended with status {status}; its output is in {log}"
