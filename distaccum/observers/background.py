"""Calls of a tracker that the training must not wait for, and the environment in which one is imported."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

_MOST_WAITING = 10_000
"""Calls that may wait for a tracker that takes none."""

_MOST_SECONDS = 10.0
"""Time that a fork waits for `forks_wait`. A tracker may wait longer for the network, but imports nothing then."""

_importing = threading.RLock()
_forking = threading.local()


@contextmanager
def forks_wait() -> Iterator[None]:
    """Has forks by other threads wait, as of data workers, while this one imports.

    A module that is half imported by another thread stays so in a forked child for ever, with its lock held: a sample
    whose loading imports it would hang.
    """
    with _importing:
        yield


def _before_fork() -> None:
    _forking.waits = _importing.acquire(timeout=_MOST_SECONDS)


def _after_fork() -> None:
    if _forking.waits:
        _importing.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


class Background:
    """Makes calls in a thread, in order. If one fails, or too many wait, a warning says so once, and the others are
    left out: the training goes on.

    Attributes:
        is_lost: whether that has happened.
    """

    def __init__(self, name: str) -> None:
        """`name`: of the tracker, for the warning."""
        self.is_lost = False
        self._name = name
        self._calls: queue.Queue[Callable[[], object] | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._run, name=f"distaccum-{name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                if not self.is_lost:
                    call()
            except Exception as error:
                self.lose(f"{type(error).__name__}: {error}")

    def later(self, call: Callable[[], object] | None) -> None:
        """Makes a call after those that wait; None ends the thread."""
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self.lose("it takes nothing")

    def lose(self, reason: str) -> None:
        """Makes no more calls."""
        if not self.is_lost:
            self.is_lost = True
            logger.warning(
                "%s has failed (%s): training goes on, and nothing more is logged there.", self._name, reason
            )

    def end(self, seconds: float) -> bool:
        """Ends the thread after the calls that wait; returns whether it has ended within some time."""
        self.later(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()


@contextmanager
def default_environment(**values: str) -> Iterator[None]:
    """Sets variables of the environment that the user has not set, for a while."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
