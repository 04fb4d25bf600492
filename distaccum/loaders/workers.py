"""The worker processes of a data loader: started with checks, watched over, and ended with the training."""

from __future__ import annotations

import errno
import functools
import logging
import math
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.synchronize import Semaphore
from multiprocessing.util import Finalize
from types import FrameType, TracebackType
from typing import Any

from torch.utils.data import DataLoader

from distaccum.errors import UserError
from distaccum.loaders._worker_internals import (
    abandon,
    disarm_half_made,
    kill_and_join,
    set_death_handler,
    shut_down,
    workers_of,
)
from distaccum.loaders.hand_over import hand_over_by_value
from distaccum.runtime.processes import signal_when_parent_ends

logger = logging.getLogger(__name__)

_SECONDS_BEFORE_FORK = 0.005
"""Time in which other threads can finish what the last collective has left to them."""

_SECONDS_TO_BEGIN = (2.0, 10.0, 60.0)
"""How long forked workers may take to reach their own code, at the first attempt and at later ones."""

_SECONDS_BETWEEN_LOOKS = 1.0
"""How often a worker checks that the training process is still there."""

_NEWER_PYTHON = (
    " A newer Python, 3.12 or the last 3.11, is not known to leave them hanging." if sys.version_info < (3, 12) else ""
)

_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.ENOMEM, errno.EAGAIN)
"""Errors for too few open files, memory, shared memory (`/dev/shm`) or processes."""

_DEATHS = {
    signal.SIGKILL: ", which is how the system ends a process when memory runs out. If it did, lower "
    "data.num_workers or data.prefetch_factor, or give the job more memory",
    signal.SIGBUS: ", which is what happens when shared memory (/dev/shm) runs out. Make it larger, or lower "
    "data.num_workers or data.prefetch_factor",
}


class DataWorkers:
    """The worker processes of a data loader, for one iteration after another.

    A worker's death is noticed where its micro-batch is waited for. Workers that a fork leaves hanging are started
    anew. That happens: CPython before 3.12, but for late releases of 3.11, waits in the child for a lock that another
    thread may hold at the moment of the fork (python/cpython#112275), and gloo's threads take it whenever a collective
    is done. A short wait before the fork lets them finish, which makes it rare.

    One death is not noticed: in the middle of a message that a pipe doesn't hold, of a worker that is no child of this
    process (under forkserver), or while another thread than the main one waits for it.

    Args:
        new_loader: makes the data loader, given the `worker_init_fn` of its workers.
        role: what the data are for, for messages.
    """

    def __init__(self, new_loader: Callable[[Callable[[int], None]], DataLoader[Any]], role: str) -> None:
        self._new_loader = new_loader
        self._role = role
        self._loader: DataLoader[Any] | None = None
        self._iterator: Any = None

    def start(self) -> None:
        """Begins the loader's next iteration, with its persistent workers or with new ones.

        Raises:
            UserError: a worker has died, or workers did not begin however often they were started.
        """
        _hold_back_deaths()
        if self._loader is not None and self._loader.persistent_workers:
            try:
                self._guarded(lambda: iter(self._loader))  # type: ignore[arg-type]
            except BaseException:
                self.end()  # batches that were not fetched would be taken for those of the next attempt
                raise
            return
        self.end()
        for attempt, seconds in enumerate(_SECONDS_TO_BEGIN, 1):
            try:
                if self._has_started(seconds):
                    return
            except (OSError, AttributeError, TypeError, pickle.PicklingError) as error:
                if (reason := self._what_is_lacking(error)) is None:
                    raise
                raise UserError(reason) from error
            if attempt < len(_SECONDS_TO_BEGIN):
                logger.warning(
                    "the worker processes that load the %s data did not begin within %g s of their fork, and are "
                    "started anew.%s",
                    self._role,
                    seconds,
                    _NEWER_PYTHON,
                )
        raise UserError(
            f"the worker processes that load the {self._role} data were started {len(_SECONDS_TO_BEGIN)} times and "
            f"never began, in the end within {_SECONDS_TO_BEGIN[-1]:g} s. Set data.num_workers=0 to load without "
            f"them.{_NEWER_PYTHON}"
        )

    def next(self) -> Any:
        """The next batch of the iteration.

        Raises:
            StopIteration: there is none.
            UserError: a worker has died.
        """
        try:
            return self._guarded(lambda: next(self._iterator))
        except Exception:
            raise
        except BaseException:
            self.end()  # Ctrl-C, which may have come in the middle of a message
            raise

    def end(self) -> None:
        """Ends the workers. A later iteration starts new ones."""
        iterator = self._iterator
        if iterator is None:
            return
        try:
            # Not left to torch, as the traceback of a failure keeps the iterator from being collected.
            if self.dead_worker() is None:
                self._watched(lambda: shut_down(iterator))
            else:
                abandon(iterator)
        except RuntimeError:
            if self.dead_worker() is None:
                raise
        finally:
            self._iterator = None
            self._loader = None  # it keeps persistent workers for its next iteration
            kill_and_join(workers_of(iterator))

    def dead_worker(self) -> Any:
        """A worker process that has ended though nobody asked it to; None if there is none."""
        return next((worker for worker in self._workers() if worker.exitcode is not None), None)

    def _has_started(self, seconds: float) -> bool:
        """Starts new workers; False if some of them do not begin in that time, and all are ended again."""
        time.sleep(_SECONDS_BEFORE_FORK)
        # Workers wait until all of them have begun: those that are ended because another one hangs have then touched
        # nothing of the dataset.
        begun, opened = multiprocessing.Semaphore(0), multiprocessing.Semaphore(0)
        # The kernel goes by the thread that starts them, which may end before the training does.
        in_main = threading.current_thread() is threading.main_thread()
        loader = self._new_loader(functools.partial(_begin_worker, begun, opened, in_main))
        others = multiprocessing.active_children()
        try:
            self._iterator = iterator = self._guarded(lambda: iter(loader))
        except BaseException as error:
            disarm_half_made(error)
            # Those that were started wait for the others, and no iterator holds them.
            kill_and_join([child for child in multiprocessing.active_children() if child not in others])
            raise
        try:
            # When the interpreter ends, multiprocessing sends them a signal that they ignore, and waits.
            Finalize(iterator, kill_and_join, args=(workers_of(iterator),), exitpriority=0)
            # Workers of another kind inherit no locks, and import for as long as they have to.
            limit = seconds if multiprocessing.get_start_method() == "fork" else math.inf
            if self._guarded(lambda: self._have_begun(begun, limit)):
                for _ in workers_of(iterator):
                    opened.release()
                self._loader = loader
        finally:
            if self._loader is None:
                kill_and_join(workers_of(iterator))
                self.end()
        return self._loader is not None

    def _what_is_lacking(self, error: Exception) -> str | None:
        """Returns why workers can't start or go on; None if neither the system nor the dataset is the cause."""
        what = f"the worker processes that load the {self._role} data can't work"
        number = error.errno if isinstance(error, OSError) else None
        if "Too many open files" in str(error):
            number = errno.EMFILE  # torch makes a RuntimeError of it
        if number is not None and number in _SHORTAGES:
            return f"{what}: {os.strerror(number)}. Raise that limit (ulimit, /dev/shm), or lower data.num_workers."
        if isinstance(error, OSError | RuntimeError) or multiprocessing.get_start_method() == "fork":
            return None
        return (
            f"{what}, as the dataset or its collate_fn can't be handed to them: {error}. Define what it holds at the "
            "top of a module (no lambda, no open file), or set data.num_workers=0."
        )

    def _have_begun(self, begun: Semaphore, seconds: float) -> bool:
        """Waits for all workers to begin; False if some do not, though none has died."""
        until = time.monotonic() + seconds
        missing = len(self._workers())
        while missing and self.dead_worker() is None:
            if begun.acquire(timeout=0.1):
                missing -= 1
            elif time.monotonic() > until:
                return False
        return True

    def _guarded(self, step: Callable[[], Any]) -> Any:
        """Calls a function in which the death of a worker may be noticed; raises a UserError for it."""

        def checked_step() -> Any:
            if self.dead_worker() is not None:
                raise RuntimeError("a data loader's worker had died before")
            return step()

        try:
            return self._watched(checked_step)
        except (RuntimeError, OSError, EOFError) as error:
            if not isinstance(error, RuntimeError):
                # The connection to a dying worker breaks a little earlier than the process can be seen to have ended.
                broken = wait([worker.sentinel for worker in self._workers()], timeout=1)
                for worker in self._workers():
                    if worker.sentinel in broken:
                        worker.join(timeout=1)
            if self.dead_worker() is not None:
                raise self._death() from error
            if (reason := self._what_is_lacking(error)) is None:
                raise
            raise UserError(reason) from error

    def _watched(self, step: Callable[[], Any]) -> Any:
        """Calls a function during which a worker's death raises RuntimeError; at other times it doesn't."""
        global _watching
        if threading.current_thread() is not threading.main_thread():
            return step()  # signals are handled in the main thread, which may be anywhere
        before, _watching = _watching, self
        try:
            return step()
        finally:
            _watching = before

    def _workers(self) -> list[Any]:
        return workers_of(self._iterator) if self._iterator is not None else []

    def _death(self) -> UserError:
        worker = self.dead_worker()
        status = worker.exitcode
        self.end()
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return UserError(
            f"a worker process that loads the {self._role} data (pid {worker.pid}) {how}"
            f"{_DEATHS.get(-status, '')}. Start again: a run with checkpoints goes on from the last one."
        )


def _begin_worker(begun: Semaphore, opened: Semaphore, ends_with_parent: bool, worker: int) -> None:
    try:
        if ends_with_parent:
            signal_when_parent_ends(signal.SIGKILL)  # also if it is stopped then, and no thread of its own runs
        sys.excepthook = _say_unless_broken_off
        hand_over_by_value()
        training = multiprocessing.parent_process()
        if training is not None:
            # torch's worker takes whoever is its parent a moment after this for the training process, and ends with
            # that one. If the training has been killed before, it would stay for ever, and with it the sockets that the
            # other ranks wait at.
            threading.Thread(target=_end_with, args=(training,), daemon=True).start()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            # Ctrl-C and a scheduler's signals reach workers too, but the training process may have a window to finish,
            # and needs them for that. They end with it in any case.
            # Not SIG_IGN, which programs that a dataset starts would inherit.
            signal.signal(number, lambda *_: None)
    finally:
        begun.release()  # torch hands an exception over in the place of the first batch
    opened.acquire()


def _say_unless_broken_off(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints no traceback for a tensor that is being handed over when the training is killed."""
    if not issubclass(kind, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, trace)


def _end_with(training: Any) -> None:
    if multiprocessing.get_start_method() == "fork":
        # Workers that were forked later hold the other end of what join() waits at.
        while os.getppid() == training.pid:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    else:
        training.join()  # the parent may be a server of forks
    os._exit(1)


_watching: DataWorkers | None = None
"""The workers that are being waited for now."""


def _hold_back_deaths() -> None:
    """Sets a signal handler by which the death of a worker is noticed only where its micro-batch is waited for.

    torch raises it from a signal handler, wherever the training is at that moment: in an optimizer step, or while it
    saves. A handler is needed, though: a worker that dies while it writes keeps the reader waiting for ever.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    # Now, as torch would do it while it starts the first workers: the death of one of them would be raised right there,
    # where a loader that is half made can't be ended.
    set_death_handler()
    handler = signal.getsignal(signal.SIGCHLD)
    if callable(handler) and not isinstance(handler, _OnlyWhereWatched):
        signal.signal(signal.SIGCHLD, _OnlyWhereWatched(handler))


@dataclass(frozen=True, slots=True)
class _OnlyWhereWatched:
    handler: Callable[[int, FrameType | None], Any]

    def __call__(self, number: int, frame: FrameType | None) -> None:
        with suppress(RuntimeError):
            self.handler(number, frame)
        if _watching is not None and any(worker.exitcode for worker in _watching._workers()):
            raise RuntimeError("a data loader's worker was killed")
