"""Forks the processes of `distaccum.tools.bench.processes` from one that has imported torch and the package.

Importing them costs each process several seconds, and forking costs next to nothing. Started as `python -m
distaccum.tools.bench.fork_server SOCKET MODULE…`, it imports the modules, and then forks a supervisor for each job that
it gets. The supervisor forks the ranks, hands on signals, and reports how they have ended.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import math
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import NoReturn

import torch

from distaccum.errors import EXIT_STATUS, OtherRankFailedError, UserError
from distaccum.runtime.logs import flush_output, make_output_safe, print_error
from distaccum.runtime.processes import signal_when_parent_ends

_MODULES = (
    "torch._dynamo",  # imported by the first optimizer
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "distaccum.tools.bench.worker",
    "distaccum.training.run",
)

HEADER_BYTES = 8
"""Before each job comes its length; three descriptors come with it: the connection to the supervisor, and the standard
output and error of the ranks."""

_LOOK_SECONDS = 0.05
_SECONDS_TO_BE_STOPPED = 5.0
_SECONDS_TO_END = 30.0
"""How long ranks may take to end after SIGTERM, when one has failed; as under torchrun."""
_SECONDS_TO_SAVE = 60.0
"""How long they may take when the process that has started them is gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Says what ranks are to do, and what they find when they start."""

    run: bytes
    """A pickled function without arguments, which returns the exit status."""
    num_processes: int
    threads: int
    """CPU threads of each process."""
    environment: dict[str, str]
    path: list[str]
    """Where modules are looked for: `sys.path`."""
    folder: str


def main() -> None:
    """Serves until the other end of the socket is closed."""
    control = socket.socket(fileno=int(sys.argv[1]))
    for module in (*_MODULES, *sys.argv[2:]):
        importlib.import_module(module)
    gc.freeze()  # a collection in a rank would copy every page that it shares with the others
    while True:
        header, descriptors, _, _ = socket.recv_fds(control, HEADER_BYTES, 3)
        with contextlib.suppress(ChildProcessError):  # none is left
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass  # a supervisor that has ended: its time, and its ranks', becomes this process's
        if not header:
            return
        job = control.recv(int.from_bytes(header), socket.MSG_WAITALL)
        if os.fork() == 0:
            control.close()
            _supervise(pickle.loads(job), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _supervise(job: Job, connection_number: int, output: int, errors: int) -> NoReturn:
    """Becomes the supervisor of a job: starts its ranks, and sends the status of the one that failed first, or 0."""
    for descriptor, number in ((output, 1), (errors, 2)):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(job.folder)
    os.environ.clear()
    os.environ |= job.environment
    sys.path[:] = job.path
    # Bound to it and no listener, this socket keeps the port from all others until rank 0 listens there.
    with socket.socket() as place:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
        pids = []
        for rank in range(job.num_processes):
            pid = os.fork()
            if pid == 0:
                os.close(connection_number)
                _become_rank(job, rank, port)
            pids.append(pid)
        with Connection(connection_number) as connection:
            status = _ended(pids, connection)
            with contextlib.suppress(OSError):  # nobody may be there any more
                connection.send(status)
    os._exit(0)


def _ended(pids: list[int], connection: Connection) -> int:
    """Waits until all ranks have ended; returns the status of the one that failed first, or 0.

    They get the signals that come over the connection. When one of them has failed, or the other end is gone, they get
    SIGTERM, and SIGKILL if they do not end then.
    """
    status, kill_at = 0, math.inf
    is_deaf = are_killed = False
    while True:
        number = None
        if is_deaf:
            time.sleep(_LOOK_SECONDS)
        elif connection.poll(_LOOK_SECONDS):
            try:
                number = connection.recv()
            except (EOFError, OSError):
                number, is_deaf, kill_at = signal.SIGTERM, True, time.monotonic() + _SECONDS_TO_SAVE
        had_failed = status != 0
        for pid in list(pids):
            ended, how = os.waitpid(pid, os.WNOHANG)
            if ended:
                pids.remove(pid)
                found = os.waitstatus_to_exitcode(how)
                # One that was killed for its memory is the reason why others have failed, whichever was seen first.
                status = found if found == -signal.SIGKILL and not are_killed else status or found
        if not pids:
            return status
        if status and not had_failed and kill_at == math.inf:
            number, kill_at = number or signal.SIGTERM, time.monotonic() + _SECONDS_TO_END
        if time.monotonic() > kill_at:
            number, kill_at = signal.SIGKILL, math.inf
        if number is not None:
            are_killed = are_killed or number == signal.SIGKILL
            for pid in pids:
                os.kill(pid, number)  # nobody else gets its number before it is waited for


def _become_rank(job: Job, rank: int, port: int) -> NoReturn:
    """Runs a job's function in the process of one rank, which ends with the status that it returns."""
    os.setsid()  # what it sends to its group is not for others
    signal_when_parent_ends(signal.SIGTERM)
    if job.num_processes > 1:
        here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.num_processes}
        here |= {"LOCAL_WORLD_SIZE": job.num_processes, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in here.items()}}
    make_output_safe()
    torch.set_num_threads(job.threads)
    status = _status(job)
    logging.shutdown()
    flush_output()
    if job.num_processes > 1:
        os._exit(status)  # as distaccum.cli does: taking the interpreter down may abort a rank that is done
    sys.exit(status)


def _status(job: Job) -> int:
    try:
        status: int = pickle.loads(job.run)()
        return status
    except OtherRankFailedError:
        time.sleep(_SECONDS_TO_BE_STOPPED)  # the supervisor would stop the rank that prints why if this one ended first
    except UserError as error:
        print_error(str(error))
    except Exception:
        traceback.print_exc()
        return 1
    return EXIT_STATUS


if __name__ == "__main__":
    main()
