"""Signs of life: each rank publishes every second what it is doing, so that the others find who died or hung."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch

from distaccum.errors import EXIT_STATUS
from distaccum.runtime.diagnosis import AGAIN, Fate, Sign, State, explain, judge, process_state, reason_of, this_host

T = TypeVar("T")

BEAT_SECONDS = 1.0
_ANSWER_SECONDS = 2.0
"""How long the store may take to answer."""
SECONDS_TO_GIVE_UP = 10.0
"""How long after another rank's failure this one is still here, if it has not noticed by itself."""
_LOOKS = 10
"""How often a rank looks for processes that have ended, 0.02 s apart, when a connection has broken."""
_STACK_AFTER = 0.7
"""A rank that does the same thing for this part of the timeout writes its stacks."""

_Activity = tuple[str, bool, int | None, int | None]
"""The work, whether it waits for other ranks, the number of the update and of the micro-step."""

_FAILED = "failed"
_TORCH = os.path.dirname(torch.__file__)


class Heartbeat:
    """Publishes what this rank is doing. It is `World.heartbeat`, and does nothing until the world has several ranks.

    A background thread writes one small entry into the ranks' store every second, over a connection of its own, so that
    nothing here ever holds up the training.

    Args:
        rank, world_size: as in torch.distributed.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.timeout_seconds = 0.0
        self.someone_failed = False
        """True once another rank is known to have failed, and thus to have reported why."""
        self._activity: _Activity = ("start of the run", False, None, None)
        self._seen: _Activity = self._activity
        self._since = time.monotonic()
        self._state = State.running
        self._beats = 0
        self._store: Any = None
        self._holder_sign: Sign | None = None
        self._failed_at: float | None = None
        self._is_said_here: Callable[[], bool] | None = None
        self._on_stuck: Callable[[BaseException], None] | None = None
        self._neighbours: list[Sign] | None = None  # not looked for yet
        self._log: TextIO | None = None
        self._log_path = ""
        self._armed_for: _Activity | None = None
        self._thread: threading.Thread | None = None
        self._main_thread = threading.get_ident()
        self._wake, self._over = threading.Event(), threading.Event()

    @property
    def is_beating(self) -> bool:
        return self._thread is not None

    @property
    def is_store_lost(self) -> bool:
        """True if the store is seen to be gone or stopped with its process: a stopped one never answers."""
        return self._holder_sign is not None and process_state(self._holder_sign) is not None

    def doing(
        self, what: str, *, update: int | None = None, micro_step: int | None = None, waits: bool = False
    ) -> None:
        """Sets what this rank does from now on. Takes a fraction of a microsecond, so any loop can call it.

        Args:
            what: a noun, as in "forward".
            update, micro_step: which one of them, counted from 1.
            waits: True for one collective, or one wait for the device behind which a collective is queued: it can't
                end before the other ranks have come. Of several in a row, each is set by a call of its own.
        """
        self._activity = (what, waits, update, micro_step)

    @contextmanager
    def waiting_in(self, what: str) -> Iterator[None]:
        """Encloses a short wait for the other ranks, after which this rank goes on with what it did before."""
        before = self._activity
        self.doing(what, waits=True)
        yield
        # Not after an error, whose message says what it ended.
        self._activity = before

    def log_to(self, path: Path) -> None:
        """Sets the log, new or existing, to which this rank's stacks are appended when it hangs."""
        self._log = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by stop()
        self._log_path = str(path)
        if self.is_beating:
            self._arm()
            self._wake.set()

    def start(
        self,
        store: Any,
        timeout_seconds: float,
        *,
        is_said_here: Callable[[], bool] | None = None,
        on_stuck: Callable[[BaseException], None] | None = None,
    ) -> None:
        """Begins to beat.

        Args:
            store: a `torch.distributed.Store` in rank 0's process that all ranks share.
            timeout_seconds: how long ranks wait for each other.
            is_said_here: whether a rank of this host has reported why the run failed; called when the store is gone.
            on_stuck: called from the background thread when this rank has waited for another in vain. For backends
                whose waits don't end with an exception.
        """
        # A copy has a connection of its own: a wait of the training's does not hold up the beats, nor the other way.
        self._store = store.clone()
        self._store.set_timeout(timedelta(seconds=_ANSWER_SECONDS))
        self.timeout_seconds = timeout_seconds
        self._is_said_here, self._on_stuck = is_said_here, on_stuck
        self._publish()
        self._thread = threading.Thread(target=self._run, name="distaccum-heartbeat", daemon=True)
        self._thread.start()

    def fail(self) -> None:
        """Publishes that this rank is ending after an error, which it or another rank reports."""
        self._state = State.failed
        if self._log is not None:
            faulthandler.cancel_dump_traceback_later()
        self._wake.set()

    def stop(self) -> None:
        """Publishes the end and stops the background thread. Never raises, and takes no longer than a store call."""
        if self._thread is not None and self._thread is not threading.current_thread():
            if self._state is State.running:
                self._state = State.left
            self._over.set()
            self._wake.set()
            # Not for ever: the thread may be in a call to a store whose process is stopped. It is a daemon.
            self._thread.join(_ANSWER_SECONDS)
            self._thread = None
        if self._log is not None:
            faulthandler.cancel_dump_traceback_later()
            with suppress(OSError):
                self._log.close()
            self._log = None

    def let_others_hear(self, have_heard: Callable[[], bool]) -> None:
        """Waits until the others can have seen this rank's failure, before the store ends with it.

        Args:
            have_heard: ends the wait when it is true.
        """
        limit = time.monotonic() + (1.5 * BEAT_SECONDS if self.is_beating else 0.0)
        while time.monotonic() < limit and not have_heard():
            time.sleep(0.1)

    def gone(self) -> int:
        """Returns how many of the other ranks are seen to have ended without a word. Asks the store."""
        return sum(process_state(sign) is Fate.gone for sign in self._look().values())

    def explain(self, error: BaseException) -> str:
        """Finds out, in about two beats, which rank this one waits for; returns a message about it.

        Args:
            error: the error with which the wait for the other ranks ended.
        """
        me = self._sign()
        if not self.is_beating:
            reason = reason_of(error)
            return f"the connection between the ranks broke before the run began, as when a rank is ended: {reason}."
        if self.is_store_lost:
            return self._explain_without_store(me, error)
        try:
            before = answer(self._look)
            # At once: soon the launcher will have ended other ranks too. A process that was killed is still there for a
            # moment after its connections are closed, for longer where others want its core.
            for _ in range(_LOOKS):
                processes = {rank: process_state(sign) for rank, sign in before.items() if sign.state is State.running}
                if any(processes.values()):
                    break
                time.sleep(0.02)
            after = before
            if not any(processes.values()):
                time.sleep(2.2 * BEAT_SECONDS)
                after = answer(self._look)
        except (RuntimeError, TimeoutError):
            return self._explain_without_store(me, error)
        others: dict[Fate, list[Sign]] = {}
        for rank, sign in after.items():
            fate = processes.get(rank) or judge(before.get(rank), sign)
            others.setdefault(fate, []).append(sign)
        return explain(me, others, timeout_seconds=self.timeout_seconds, error=error)

    def _explain_without_store(self, me: Sign, error: BaseException) -> str:
        if self._holder_sign is not None:
            fate = process_state(self._holder_sign) or Fate.gone
            return explain(me, {fate: [self._holder_sign]}, timeout_seconds=self.timeout_seconds, error=error)
        return (
            f"the connection between the ranks broke in {me.doing}, and rank 0, which kept their signs of life, does "
            f"not answer: it or its host is gone ({reason_of(error)}). {AGAIN}"
        )

    def _look(self) -> dict[int, Sign]:
        """The other ranks' last signs."""
        ranks = [rank for rank in range(self.world_size) if rank != self.rank and self._store.check([_key(rank)])]
        values = self._store.multi_get([_key(rank) for rank in ranks]) if ranks else []
        return {rank: Sign.from_json(value) for rank, value in zip(ranks, values, strict=True)}

    # From here on: the background thread.

    def _run(self) -> None:
        while True:
            is_last = self._over.is_set()
            if self.is_store_lost:
                if self._state is State.running and self._is_said_here is not None and self._is_said_here():
                    self.someone_failed = True
            else:
                # Without the store nothing can be published; errors that follow are explained by explain().
                with suppress(RuntimeError):
                    self._beat()
            if self._state is State.running and self.someone_failed:
                self._follow_failure()
            if is_last:
                return
            self._wake.wait(BEAT_SECONDS)
            self._wake.clear()

    def _beat(self) -> None:
        activity = self._activity
        if activity is not self._seen:
            self._seen, self._since = activity, time.monotonic()
        if self._state is State.running:
            self._arm()
        self._publish()
        if self._state is not State.running:
            return
        self._listen()
        if not self.someone_failed and self._on_stuck is not None:
            self._watch(self._on_stuck)

    def _publish(self) -> None:
        self._beats += 1
        self._store.set(_key(self.rank), self._sign().to_json())
        if self._state is State.failed:
            self._store.set(_FAILED, str(self.rank))

    def _sign(self) -> Sign:
        what, waits, update, micro_step = activity = self._activity
        step = f" of micro-step {micro_step}" if micro_step is not None else ""
        seconds = time.monotonic() - self._since if activity is self._seen else 0.0
        return Sign(
            rank=self.rank,
            beat=self._beats,
            state=self._state,
            doing=f"the {what}{step}" + (f" of update {update}" if update is not None else ""),
            waits=waits,
            seconds=seconds,
            where=self._where() if seconds >= BEAT_SECONDS / 2 else "",
            host=this_host(),
            pid=os.getpid(),
            log=self._log_path,
        )

    def _where(self) -> str:
        """The innermost line of the main thread that is not torch's own."""
        frame = sys._current_frames().get(self._main_thread)
        while frame is not None and frame.f_code.co_filename.startswith(_TORCH):
            frame = frame.f_back
        return f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})" if frame else ""

    def _arm(self) -> None:
        """Sets a timer, which needs no Python to run, that writes the stacks if nothing changes from here on."""
        if self._log is not None and self._armed_for is not self._seen:
            self._armed_for = self._seen
            faulthandler.dump_traceback_later(self.timeout_seconds * _STACK_AFTER, file=self._log)

    def _listen(self) -> None:
        if not self.someone_failed and self._store.check([_FAILED]):
            self.someone_failed = True
        if self.rank != 0 and self._store.check([_key(0)]):
            self._holder_sign = Sign.from_json(self._store.get(_key(0)))

    def _follow_failure(self) -> None:
        """Ends this process some time after another rank's failure, if it has not noticed: it is busy, or it hangs."""
        now = time.monotonic()
        if self._failed_at is None:
            self._failed_at = now
            # The message of the rank that reports names this log, so the stacks must be in it.
            self._note("another rank has failed; the stacks of all threads follow")
            if self._log is not None:
                with suppress(OSError, ValueError):
                    faulthandler.dump_traceback(file=self._log, all_threads=True)
        elif now - self._failed_at > SECONDS_TO_GIVE_UP:
            # Its next collective would fail, but what it does now may never end.
            self._note(f"left {SECONDS_TO_GIVE_UP:.0f} s after another rank's failure")
            os._exit(EXIT_STATUS)

    def _watch(self, on_stuck: Callable[[BaseException], None]) -> None:
        """Ends a wait that no exception ends: after the timeout, or as soon as a rank on this host is seen to be gone.

        Other hosts' ranks take the timeout: to look at all of them each second would be too much for a large world.
        """
        waits, seconds = self._seen[1], time.monotonic() - self._since
        if not waits or seconds < 2 * BEAT_SECONDS:
            return
        if self._neighbours is None:
            self._neighbours = [sign for sign in self._look().values() if sign.host == this_host()]
        error: Exception | None = None
        if any(process_state(sign) is Fate.gone for sign in self._neighbours):
            error = RuntimeError("a process is gone")
        elif seconds > self.timeout_seconds:
            error = TimeoutError(f"timed out after {self.timeout_seconds:g} s")
        if error is not None:
            self._on_stuck = None
            self._state = State.failed
            self._publish()
            on_stuck(error)

    def _note(self, text: str) -> None:
        if self._log is not None:
            now, sign = time.strftime("%Y-%m-%d %H:%M:%S"), self._sign()
            with suppress(OSError, ValueError):  # a full disk must not end the signs of life
                self._log.write(f"{now} rank {self.rank}, for {sign.seconds:.0f} s in {sign.doing}: {text}\n")
                self._log.flush()


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"


def answer(ask: Callable[[], T], seconds: float = _ANSWER_SECONDS) -> T:
    """Returns what a call to the store returns, if it does so in time.

    A store whose process is stopped takes calls and never answers, whatever timeout it was given.

    Raises:
        TimeoutError: no answer.
        RuntimeError: the store is gone.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(ask())
        except Exception as error:
            outcome.set_exception(error)

    # Not an executor's thread, for which the end of the process would wait.
    threading.Thread(target=run, name="distaccum-store", daemon=True).start()
    return outcome.result(seconds)
