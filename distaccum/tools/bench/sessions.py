"""Starts the processes of one placement, sends them commands, receives their answers, and ends them."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distaccum.tools.bench.processes import has_ended, log_of, start_worker

_GRACE_SECONDS = 10.0
"""How long processes may take to end when they are asked to."""
_SECONDS_FOR_OTHERS = 3.0
"""How long the other ranks may take to answer when one has failed; most likely they wait for it, and never will."""


class PlacementFailedError(Exception):
    """A placement can't be measured; the message is the reason, in one line.

    Attributes:
        kind: `user` (its configuration can't be run here), `memory`, `bug`, `died` or `silent`.
        is_alive: True if all ranks have answered, so that another command may be sent.
    """

    def __init__(self, reason: str, kind: str, *, is_alive: bool = False) -> None:
        super().__init__(reason)
        self.kind = kind
        self.is_alive = is_alive


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """The processes to start, and what they get."""

    config: dict[str, Any]
    """The typed configuration, by `to_portable`."""
    num_processes: int
    sync_every_step: bool
    threads: int
    reference: Path
    log: Path
    """The file for all output of the processes."""


class _Connection:
    """The connection to a rank."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.rank = -1
        self._received = b""

    def receive(self) -> list[dict[str, Any]] | None:
        """Returns the answers that have arrived whole; None if the connection is closed."""
        try:
            data = self.socket.recv(1 << 20)
        except ConnectionError:
            data = b""
        if not data:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        return [json.loads(line) for line in lines]


class Session:
    """The processes of one placement. A context manager: at its end no process is left.

    Raises:
        PlacementFailedError: from `ask` and at the start, when they end, fail or don't answer in time.
    """

    def __init__(self, job: Job, timeout_seconds: float) -> None:
        self._job = job
        self._timeout = timeout_seconds
        self._selector = selectors.DefaultSelector()
        self._connections: list[_Connection] = []
        self._pids: list[int] = []
        self._folder = tempfile.TemporaryDirectory(prefix="distaccum-")
        self._process: subprocess.Popen[bytes] | None = None
        self._is_dismissed = False
        self._is_waiting = False
        """True as long as an answer is missing: ranks that compute, or hang, read no command."""
        try:
            self._process = self._start()
            self._pids += [greeting["pid"] for greeting in self._answers("starting")]
            self._connections.sort(key=lambda connection: connection.rank)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> subprocess.Popen[bytes]:
        folder = Path(self._folder.name)
        # In a folder of the system: the path of such a socket must be short.
        path = str(folder / "socket")
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(path)
        self._server.listen(self._job.num_processes)
        self._selector.register(self._server, selectors.EVENT_READ, None)
        job = self._job
        content = {"config": job.config, "sync_every_step": job.sync_every_step, "reference": str(job.reference)}
        return start_worker(
            "distaccum.tools.bench.worker",
            content | {"socket": path},
            folder,
            num_processes=job.num_processes,
            threads=job.threads,
            log=job.log,
        )

    def ask(self, do: str, **arguments: Any) -> list[dict[str, Any]]:
        """Sends a command to all ranks; returns their answers, by rank."""
        command = json.dumps({"do": do, **arguments}).encode() + b"\n"
        for connection in self._connections:
            try:
                connection.socket.sendall(command)
            except OSError:
                raise self._died() from None
        answers = self._answers(do)
        failures = [answer for answer in answers if not answer["ok"]]
        if failures:
            is_alive = len(failures) == self._job.num_processes
            raise PlacementFailedError(failures[0]["reason"], failures[0]["kind"], is_alive=is_alive)
        return answers

    def _answers(self, doing: str) -> list[dict[str, Any]]:
        """Waits for one answer of each rank; once one has failed, for those that come soon. Returns failures first."""
        deadline = time.monotonic() + self._timeout
        answers: dict[int, dict[str, Any]] = {}
        failed = False
        self._is_waiting = True
        while len(answers) < self._job.num_processes:
            if (left := deadline - time.monotonic()) <= 0:
                if failed:
                    break
                missing = self._job.num_processes - len(answers)
                who = "" if self._job.num_processes == 1 else f" from {missing} of {self._job.num_processes} ranks"
                raise PlacementFailedError(f"no answer{who} within {self._timeout:g} s ({doing}): stopped", "silent")
            for key, _ in self._selector.select(min(left, 0.5)):
                if key.data is None:
                    connection = _Connection(self._server.accept()[0])
                    self._connections.append(connection)
                    self._selector.register(connection.socket, selectors.EVENT_READ, connection)
                    continue
                connection = key.data
                received = connection.receive()
                if received is None:
                    self._selector.unregister(connection.socket)
                    # The answer of a rank that has lost another one may arrive before that one's end is seen.
                    if all(answer.get("ok", True) or answer["kind"] == "died" for answer in answers.values()):
                        raise self._died()
                    deadline = time.monotonic()
                    break
                for answer in received:
                    if connection.rank < 0:
                        connection.rank = answer["rank"]
                    answers[connection.rank] = answer
                    if not answer.get("ok", True) and not failed:
                        # Ranks that wait for this one in a collective will never answer.
                        failed = True
                        deadline = min(deadline, time.monotonic() + _SECONDS_FOR_OTHERS)
            if self._process is not None and self._process.poll() is not None and not failed:
                raise self._died()
        self._is_waiting = len(answers) < self._job.num_processes
        return sorted(answers.values(), key=lambda answer: answer.get("ok", True))

    def _died(self) -> PlacementFailedError:
        """Returns why processes have ended without an answer, from their output."""
        assert self._process is not None
        has_ended(self._process, _GRACE_SECONDS)
        text = log_of(self._job.log)
        status = self._process.returncode
        if status == -signal.SIGKILL or "Signal 9" in text or "exitcode  : -9" in text:
            return PlacementFailedError("killed by signal 9: out of memory, most likely", "memory")
        said = [line.strip() for line in text.splitlines() if line and not line[0].isspace() and "rror: " in line]
        # torchrun's own report comes last and holds less.
        said = [line for line in said if "ChildFailedError" not in line] or ["it printed no error"]
        return PlacementFailedError(f"the process ended with status {status}: {said[0][:300]}", "died")

    def dismiss(self) -> None:
        """Asks the processes to end, and does not wait for it."""
        if self._process is not None and not self._is_dismissed:
            self._is_dismissed = True
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.socket.sendall(b'{"do": "end"}\n')

    def close(self) -> None:
        """Ends the processes: asks, then stops, then kills."""
        self.dismiss()
        process = self._process
        if process is not None:
            if not has_ended(process, 0.1 if self._is_waiting else _GRACE_SECONDS):
                process.terminate()
            if not has_ended(process, 2.0):
                # Ranks that torchrun could not end; as long as it runs, no other process has their numbers.
                for pid in self._pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.kill()
                process.wait()
        for connection in self._connections:
            connection.socket.close()
        self._selector.close()
        self._server.close()
        self._folder.cleanup()
