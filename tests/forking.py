"""Python commands that start at once: forked from a process that has imported everything already.

Importing torch and the package takes seconds of a core, far more than most of what tests then look at; only what is
about a cold start starts cold. `python forking.py` reads a request per line and answers with one: it forks processes,
or says which have ended. The functions here are the other end.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import math
import os
import re
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import warm_python

from distaccum.errors import EXIT_STATUS

TESTS = Path(__file__).parent
ROOT = TESTS.parent

_LIMIT_SECONDS = 150.0
"""What a process may take before it is aborted."""
_SECONDS_FOR_OTHERS = 0.5
"""How long ranks go on after one of them has failed, before they are asked to stop, as launchers do."""
_IMPORTED = (
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.distributed.optim",  # for the sharded optimizer
    "torch.distributed.run",
    "torch.nn.parallel",
    "distaccum.training.run",
    *(f"distaccum.tools.{name}" for name in ("check", "compare", "evaluate", "memory", "report", "study", "tune")),
)


def environment(**more: str) -> dict[str, str]:
    """What processes of tests get."""
    folders = [str(folder) for folder in (ROOT, TESTS, TESTS / "distributed", TESTS / "faults")]
    path = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONPATH": path, **more}


@dataclass(frozen=True, slots=True)
class Ended:
    """How processes that were started together ended.

    Attributes:
        statuses: of each, negative for a signal.
        out, err: what all of them wrote.
    """

    statuses: list[int]
    out: str
    err: str

    @property
    def status(self) -> int:
        """That of the first one that failed, else 0."""
        return next((status for status in self.statuses if status), 0)

    @property
    def message(self) -> str:
        """The one message of a run that was refused: said by one rank, with status 2 and without a traceback."""
        assert {2} <= set(self.statuses) <= {2, -signal.SIGTERM}, self
        assert "Traceback" not in self.out + self.err, self.err
        said = re.findall("^error: (.+)$", self.err, re.MULTILINE)
        assert len(said) == 1, self
        return str(said[0])


class Running:
    """Processes that have been started together. What is named as in `subprocess.Popen` is about the first of them.

    Attributes:
        pids: their process numbers.
    """

    def __init__(self, pids: list[int], folder: Path, server: _Server) -> None:
        self.pids = pids
        self._folder = folder
        self._server = server

    @property
    def pid(self) -> int:
        return self.pids[0]

    def poll(self) -> int | None:
        status: int | None = self._statuses()[0]
        return status

    def wait(self, timeout: float = math.inf) -> int:
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.02)
        return status

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def ended(self) -> Ended:
        """Waits for the end of all."""
        while None in (statuses := self._statuses()):
            time.sleep(0.02)
        texts = [
            "".join(path.read_text(errors="replace") for path in sorted(self._folder.glob(f"{kind}*")))
            for kind in ("out", "err")
        ]
        return Ended(statuses, *texts)

    def _statuses(self) -> Any:
        return self._server.ask(look_at=self.pid)

    def _send(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def start(
    *command: str,
    ranks: int = 1,
    launched: bool | None = None,
    folder: Path | None = None,
    terminal: str | None = None,
    said: Path | None = None,
    imported: tuple[str, ...] = (),
    **variables: str,
) -> Running:
    """Starts a Python command, in a process or in several; returns at once.

    Args:
        command: what comes after `python`: `-m` and a module, or a file.
        ranks: number of processes.
        launched: tell each which rank it is, as launchers do; by default if there are several.
        folder: the current one, unless it is the caller's.
        terminal: path of a terminal to read from, to write to, and to be controlled by; by default there is none.
        said: file that all output is appended to; `ended` then has none.
        imported: modules that the command imports besides, where that takes long: it is done once for all commands that
            name the same.
        variables: of the environment, beside those that the caller has.
    """
    outputs = Path(_outputs(), str(next(_numbers)))
    outputs.mkdir()
    where = terminal or said
    files = [[str(where or outputs / f"{kind}{rank}") for kind in ("out", "err")] for rank in range(ranks)]
    server = _server(imported)
    pids = server.ask(
        command=command,
        launched=ranks > 1 if launched is None else launched,
        folder=str(folder or Path.cwd()),
        source=terminal or os.devnull,
        outputs=files,
        variables=environment(**variables),
    )
    return Running(pids, outputs, server)


def run(*command: str, **more: Any) -> Ended:
    """As `start`; waits for the end."""
    return start(*command, **more).ended()


def torchrun(*command: str) -> tuple[str, ...]:
    """The command for `start` that does what `torchrun COMMAND…` does, with ranks that are forked as well."""
    return (str(TESTS / "forked_torchrun.py"), *command)


@functools.cache
def python() -> str:
    """Returns the path of a `python` whose processes are forked as well: see `warm_python`.

    For commands with pipes or a terminal of their own, or in which another program starts Python. Beside it lies
    `torchrun`.
    """
    return str(_server().ask(python=True))


class _Server:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._lock = threading.Lock()

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())


_closing = ExitStack()
_starting = threading.Lock()
_numbers = iter(range(10**9))


def _server(imported: tuple[str, ...] = ()) -> _Server:
    with _starting:
        return _started(imported)


@functools.cache
def _started(imported: tuple[str, ...]) -> _Server:
    """For as long as this process lives."""
    process = subprocess.Popen(
        [sys.executable, __file__, tempfile.mkdtemp(dir=_outputs()), *imported],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    _closing.push(process)
    assert process.stdin is not None
    _closing.callback(process.stdin.close)
    return _Server(process)


@functools.cache
def _outputs() -> str:
    folder = tempfile.mkdtemp(prefix="outputs-")
    _closing.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


atexit.register(_closing.close)

# From here on: the other process.


class _Launch:
    def __init__(self, pids: list[int], are_ranks: bool) -> None:
        self.statuses: dict[int, int | None] = dict.fromkeys(pids)
        self._are_ranks = are_ranks
        self._limit, self._stop_at = time.monotonic() + _LIMIT_SECONDS, math.inf

    def look(self) -> list[int | None]:
        """Statuses, None for what runs. Stops ranks a moment after one has failed, and aborts what takes too long."""
        for pid in self._left():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.statuses[pid] = os.waitstatus_to_exitcode(status)
        if self._are_ranks and EXIT_STATUS in self.statuses.values() and self._stop_at == math.inf:
            self._stop_at = time.monotonic() + _SECONDS_FOR_OTHERS
        for pid in self._left():
            if time.monotonic() > self._limit:
                os.kill(pid, signal.SIGABRT)
            elif time.monotonic() > self._stop_at:
                os.kill(pid, signal.SIGTERM)
        if time.monotonic() > self._stop_at:
            self._stop_at = self._limit
        return list(self.statuses.values())

    def _left(self) -> list[int]:
        return [pid for pid, status in self.statuses.items() if status is None]


def _serve() -> None:
    import torch

    torch.set_num_threads(1)
    for module in (*_IMPORTED, *sys.argv[2:]):
        importlib.import_module(module)
    from distaccum.config.compose import compose

    compose(["data=synthetic", "model=mlp"])
    gc.freeze()  # no child need look through what has been imported
    assert len(os.listdir("/proc/self/task")) == 1, "what is forked must not have threads"
    folder = Path(sys.argv[1])
    listener = warm_python.install(folder)
    # Not before: `multiprocessing` has looked it up, as its processes watch who has started them.
    sys.executable = str(folder / "python")
    launches: dict[int, _Launch] = {}
    supervisors: set[int] = set()
    while True:
        for pid in list(supervisors):
            if os.waitpid(pid, os.WNOHANG)[0]:
                supervisors.remove(pid)
        ready, _, _ = select.select([sys.stdin, listener], [], [])
        if listener in ready:
            supervisors.add(warm_python.serve(listener, run_in_this_process))
        if sys.stdin not in ready:
            continue
        line = sys.stdin.readline()  # the next one comes after the answer
        if not line:
            return
        request = json.loads(line)
        if "python" in request:
            answer: Any = sys.executable
        elif "look_at" in request:
            answer = launches[request["look_at"]].look()
        else:
            answer = _forked(**request)
            launches[answer[0]] = _Launch(answer, request["launched"])
        print(json.dumps(answer), flush=True)


def _forked(
    command: list[str], launched: bool, folder: str, source: str, outputs: list[list[str]], variables: dict[str, str]
) -> list[int]:
    with socket.socket() as finder:
        finder.bind(("127.0.0.1", 0))
        port = finder.getsockname()[1]
    pids = []
    for rank, files in enumerate(outputs):
        here: dict[str, str] = {}
        if launched:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(outputs), "LOCAL_WORLD_SIZE": len(outputs)}
            here = {key: str(value) for key, value in numbers.items()}
            here |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for file in files:
            os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY))
        if pid := os.fork():
            pids.append(pid)
            continue
        try:
            os.setsid()
            os.dup2(os.open(source, os.O_RDONLY), 0)
            for number, file in enumerate(files, 1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
            os.closerange(3, 1024)
            os.chdir(folder)
            run_in_this_process(command, {**variables, **here})
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(70)
    return pids


def run_in_this_process(command: list[str], variables: dict[str, str]) -> None:
    """Runs what comes after `python`, and ends the process with its status, as the interpreter would."""
    os.environ.clear()
    os.environ |= variables
    sys.path[:0] = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry not in sys.path]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    status = 0
    try:
        if command[0] == "-c":
            sys.path.insert(0, "")
            sys.argv = ["-c", *command[2:]]
            sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(command[1], "<string>", "exec"), vars(sys.modules["__main__"]))
        elif command[0] == "-m":
            sys.path.insert(0, os.getcwd())
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(command[0]).parent))
            sys.argv = command
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # torch's, on ranks
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve()
