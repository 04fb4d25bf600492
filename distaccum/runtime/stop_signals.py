"""Signals that end a run at the next boundary between updates, with everything saved."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Literal

from distaccum.runtime.world import World

Fate = Literal["finish", "drop"]

_HANG_UP = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, *_HANG_UP)
"""Ctrl-C; what launchers and SLURM send before they kill; what SLURM sends ahead of that when asked to; what a terminal
that is closed sends, unless the run was started to outlive it (`nohup`)."""


class Interruption:
    """Notes the first signal to stop; the run checks for it where it can stop in good order.

    Args:
        world: the run's ranks, which decide together whether to drop a window. Default: this process alone.

    Attributes:
        signal_name: `SIGTERM`, …; None as long as none has come.
    """

    def __init__(self, world: World | None = None) -> None:
        self.signal_name: str | None = None
        self._world = world
        self._came_at = 0.0
        self._is_counted = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles signals for a while. A second Ctrl-C ends the process at once, whatever it is doing."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are the main thread's
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
            self._came_at = time.monotonic()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if self._world is None or not self._world.launched:
                # Not by print: the signal may have come in the middle of one.
                with suppress(OSError):
                    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, _CTRL_C_SEEN)

    def is_requested(self) -> bool:
        """True once a signal has come to this rank."""
        return self.signal_name is not None

    def seconds_since(self) -> float:
        """Seconds since the signal came."""
        return time.monotonic() - self._came_at

    def settle(self, work: str, wish: Fate | None) -> Fate | None:
        """Returns what all ranks do with a piece of work: the first wish counts, also for those that ask later.

        Called before each of its steps once a signal has come, so that no rank starts the step that waits for all ranks
        (a window's last backward, the end of an evaluation) after another rank has dropped the work. Work is dropped
        only if every rank has got the signal, and so calls this.

        Args:
            work: its name, the same on all ranks.
            wish: `drop` to give it up; `finish` before the step that waits; None to see what others have done.
        """
        world = self._world
        if world is None or world.world_size == 1:
            return wish
        if wish == "finish" and not self._is_counted:
            # Nobody can have dropped it yet, and nobody will: this rank is counted after its wish.
            world.first_wish(work, wish)
        if not self._is_counted:
            self._is_counted = True
            world.count("interrupted")
        if wish == "drop" and world.count("interrupted", 0) < world.world_size:
            wish = None
        return world.first_wish(work, wish)  # type: ignore[return-value]


_CTRL_C_SEEN = b"\nstopping after this update, and saving; Ctrl-C again to leave at once\n"
