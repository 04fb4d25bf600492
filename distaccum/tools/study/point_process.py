"""Runs one training of a study in processes of its own, until it has reached the target or its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from distaccum.config import TrainConfig
from distaccum.errors import EXIT_INTERRUPTED, EXIT_UNFINISHED
from distaccum.tools.bench.processes import Ranks
from distaccum.training.run import train

_LOOK_SECONDS = 0.25
_SHARE_OF_LOOKING = 0.05
"""Reading how far a long run is takes time: no more than this part of it."""
_STOP_SECONDS = 60.0
"""How long a run may take to save and end."""


class PointFailedError(Exception):
    """A run ended with an error; the message is its own."""


def run(config: TrainConfig, has_learned_enough: Callable[[], bool], *, ranks: int, threads: int, log: Path) -> None:
    """Runs a training until it has learned enough or is at its end.

    It goes on from its checkpoint, if there is one. However this ends, no process is left, and the run has saved.

    Args:
        has_learned_enough: reads how far it has come, and returns whether it may stop there.
        log: the file for all output of the processes.

    Raises:
        PointFailedError: it ended with an error.
    """
    assert config.run_dir is not None
    process = Ranks(partial(_train, config), num_processes=ranks, threads=threads, log=log)
    try:
        is_stopped = _watch(process, has_learned_enough)
    finally:
        process.stop(_STOP_SECONDS)
    if is_stopped:
        # It asks to be started again, but the study has what it needs of it.
        (Path(config.run_dir) / "unfinished.json").unlink(missing_ok=True)
    elif reason := process.failure():
        raise PointFailedError(reason)


def _train(config: TrainConfig) -> int:
    """Trains as `distaccum.train` does; returns its exit status."""
    interrupted = train(config).interrupted
    if interrupted is None:
        return 0
    return EXIT_INTERRUPTED if interrupted == "SIGINT" else EXIT_UNFINISHED


def _watch(process: Ranks, has_learned_enough: Callable[[], bool]) -> bool:
    """Waits until a run has learned enough, or has ended before that; returns whether it has learned enough."""
    pause = _LOOK_SECONDS
    while not process.has_ended(pause):
        began = time.monotonic()
        if has_learned_enough():
            return True
        pause = max(_LOOK_SECONDS, (time.monotonic() - began) / _SHARE_OF_LOOKING)
    return False
