"""Runs a function in processes of its own, one for each rank."""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Pipe
from pathlib import Path

from distaccum.tools.bench import fork_server

KILLED = "killed by signal 9: out of memory, most likely"

_SECONDS_TO_DIE = 10.0
"""How long the kernel may take to end a process that was killed."""


class Forked:
    """Processes that run a function, forked from one that has imported torch and the package.

    They get neither Ctrl-C nor the variables of Slurm: whoever has started them has to stop them. If that process ends,
    they get SIGTERM, and are killed a minute later. When one of them fails, the others get SIGTERM, as under torchrun.

    Args:
        run: returns the exit status. A function of a module, or a `partial` of one: it is pickled.
        threads: CPU threads of each process.
        output, errors: descriptors of files for their standard output and error.
        imports: more modules to import before forking. They must not initialize CUDA, nor start threads.
    """

    def __init__(
        self,
        run: Callable[[], int],
        *,
        num_processes: int,
        threads: int,
        output: int,
        errors: int,
        imports: tuple[str, ...] = (),
    ) -> None:
        job = fork_server.Job(
            run=pickle.dumps(run),
            num_processes=num_processes,
            threads=threads,
            environment=_environment(threads),
            path=[path or os.getcwd() for path in sys.path],
            folder=os.getcwd(),
        )
        self._connection, theirs = Pipe()
        with theirs:
            kind = os.getpid(), threads, imports
            if kind not in _servers or not _servers[kind].is_alive():
                _servers[kind] = _Server(threads, imports, errors)
            self._server = _servers[kind]
            self._server.send(job, [theirs.fileno(), output, errors])
        self.status: int | None = None
        """0, or the status of the process that failed first, negative for a signal; None until all have ended."""

    def has_ended(self, seconds: float = 0.0) -> bool:
        """Returns whether all have ended, after some seconds at most."""
        if self.status is None and self._connection.poll(seconds):
            try:
                self.status = self._connection.recv()
            except (EOFError, OSError):
                self.status = self._server.failure() or -signal.SIGKILL  # of their supervisor
            self._connection.close()
        return self.status is not None

    def stop(self, seconds: float) -> None:
        """Sends SIGTERM to those that have not ended, and kills them if that takes longer than some seconds."""
        for number, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, _SECONDS_TO_DIE)):
            if not self.has_ended():
                with contextlib.suppress(OSError):
                    self._connection.send(number)
                self.has_ended(patience)
        self._connection.close()
        self.status = -signal.SIGKILL if self.status is None else self.status


class Ranks(Forked):
    """Processes that run a function and write into a log, from which the reason of a failure is read.

    Args:
        run, num_processes, threads: as of `Forked`.
        log: the file for all output of the processes; what it holds already stays.
    """

    def __init__(self, run: Callable[[], int], *, num_processes: int, threads: int, log: Path) -> None:
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._log_start = output.tell()
            number = output.fileno()
            super().__init__(run, num_processes=num_processes, threads=threads, output=number, errors=number)

    def failure(self) -> str | None:
        """Returns why they have ended with an error, from their output; None if they have not."""
        if self.status == 0:
            return None
        if self.status == -signal.SIGKILL:
            return KILLED
        text = self._log.read_bytes()[self._log_start :].decode(errors="replace")
        said = [line for line in text.splitlines() if "rror: " in line and not line[0].isspace()]
        own = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
        return (own or said or [f"it ended with status {self.status}; its output is in {self._log}"])[0][:400]


class _Server:
    """The process from which others are forked, seen from the one that has started it."""

    def __init__(self, threads: int, imports: tuple[str, ...], errors: int) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", fork_server.__name__, str(theirs.fileno()), *imports],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=_environment(threads),
            )
        atexit.register(self._end, os.getpid())

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def failure(self) -> int | None:
        """Returns the status with which the server has failed; None if it is there."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.5)  # its connections have gone before it
        return self._process.returncode

    def send(self, job: fork_server.Job, descriptors: list[int]) -> None:
        """Has a job done. If the server has just died, the job ends at once, as all see who look at its connection."""
        content = pickle.dumps(job)
        with contextlib.suppress(OSError):
            socket.send_fds(self._control, [len(content).to_bytes(fork_server.HEADER_BYTES)], descriptors)
            self._control.sendall(content)

    def _end(self, started_by: int) -> None:
        if os.getpid() == started_by:
            with contextlib.suppress(OSError):
                self._control.shutdown(socket.SHUT_RDWR)
            self._control.close()
            self._process.wait()


_servers: dict[tuple[int, int, tuple[str, ...]], _Server] = {}
"""By the process that has started it, the threads of its ranks, which libraries take over when they are loaded, and
what it has imported besides."""


def _environment(threads: int) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
        "OMP_NUM_THREADS": str(threads),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        # What this process finds, its children find too: the package in a checkout, the user's own modules.
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }
