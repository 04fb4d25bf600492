"""Sends commands to the processes of one placement, and receives their answers."""

from __future__ import annotations

import contextlib
import socket
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from distaccum.config import TrainConfig
from distaccum.tools.bench.processes import KILLED, Ranks
from distaccum.tools.bench.worker import serve

_GRACE_SECONDS = 10.0
"""How long processes may take to end when they are asked to."""
_SECONDS_FOR_OTHERS = 3.0
"""How long the rank that another one has lost may take to say why, or to be seen to have ended."""


class PlacementFailedError(Exception):
    """A placement can't be measured; the message is the reason, in one line.

    Attributes:
        kind: `user` (its configuration can't be run here), `memory`, `bug`, `died` or `silent`.
    """

    def __init__(self, reason: str, kind: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(kw_only=True, slots=True)
class Session:
    """The processes of one placement: started by the first question, and anew by the first one after `close`."""

    config: TrainConfig
    num_processes: int
    sync_every_step: bool
    threads: int
    """CPU threads of each process."""
    reference: Path
    """File of the float64 run's result."""
    log: Path
    """The file for all output of the processes."""
    timeout_seconds: float
    """How long an answer may take."""
    _ranks: Ranks | None = None
    _connections: dict[Connection[Any, Any], int] = field(default_factory=dict)
    """Each with its rank."""

    def ask(self, do: str, **arguments: Any) -> list[dict[str, Any]]:
        """Sends a command to all ranks; returns their answers, by rank.

        Raises:
            PlacementFailedError: they end, fail or don't answer in time. No process is left then.
        """
        try:
            if self._ranks is None:
                self._start()
            for connection in self._connections:
                with contextlib.suppress(OSError):  # it has ended, which is noticed in place of its answer
                    connection.send((do, arguments))
            return self._answers(do)
        except BaseException:
            self.close(0.1)  # ranks that compute, or hang, don't notice
            raise

    def _start(self) -> None:
        deadline = time.monotonic() + self.timeout_seconds
        # In a folder of the system: the path of such a socket must be short.
        with tempfile.TemporaryDirectory(prefix="distaccum-") as folder, socket.socket(socket.AF_UNIX) as server:
            address = f"{folder}/socket"
            server.bind(address)
            server.listen(self.num_processes)
            server.settimeout(0.5)
            run = partial(serve, address, self.config, sync_every_step=self.sync_every_step, reference=self.reference)
            self._ranks = Ranks(run, num_processes=self.num_processes, threads=self.threads, log=self.log)
            while len(self._connections) < self.num_processes:
                if self._ranks.has_ended():
                    raise self._died()
                if time.monotonic() > deadline:
                    raise self._silent("starting", self.num_processes - len(self._connections))
                with contextlib.suppress(TimeoutError, EOFError):
                    connection: Connection[Any, Any] = Connection(server.accept()[0].detach())
                    self._connections[connection] = connection.recv()

    def _answers(self, doing: str) -> list[dict[str, Any]]:
        deadline = time.monotonic() + self.timeout_seconds
        answers: dict[int, dict[str, Any]] = {}
        missing = dict(self._connections)
        lost: PlacementFailedError | None = None
        while missing:
            ready = wait(list(missing), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise lost or self._silent(doing, len(missing))
            for connection in ready:
                assert isinstance(connection, Connection)
                try:
                    answer = connection.recv()
                except (EOFError, OSError):
                    raise self._died() from None
                answers[missing.pop(connection)] = answer
                if "reason" in answer:
                    failure = PlacementFailedError(answer["reason"], answer["kind"])
                    if failure.kind != "died":
                        raise failure
                    # What the rank says that this one has lost, or the way in which it ended, is the reason.
                    lost = lost or failure
                    deadline = min(deadline, time.monotonic() + _SECONDS_FOR_OTHERS)
        if lost is not None:
            raise lost
        return [answers[rank] for rank in sorted(answers)]

    def _silent(self, doing: str, missing: int) -> PlacementFailedError:
        who = "" if self.num_processes == 1 else f" from {missing} of {self.num_processes} ranks"
        reason = f"no answer{who} within {self.timeout_seconds:g} s ({doing}): stopped at timeout_seconds"
        return PlacementFailedError(reason, "silent")

    def _died(self) -> PlacementFailedError:
        """Returns why processes have ended without an answer."""
        assert self._ranks is not None
        self._ranks.has_ended(_GRACE_SECONDS)
        reason = self._ranks.failure() or "it ended before it had answered"
        return PlacementFailedError(reason, "memory" if reason == KILLED else "died")

    def dismiss(self) -> None:
        """Asks the processes to end, and does not wait for it."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()

    def close(self, patience: float = _GRACE_SECONDS) -> None:
        """Ends the processes, if there are any: asks, stops them after some seconds, then kills."""
        self.dismiss()
        ranks, self._ranks = self._ranks, None
        if ranks is not None:
            ranks.has_ended(patience)
            ranks.stop(2.0)
