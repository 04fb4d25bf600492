"""Training processes that start at once: forked from one that has imported everything already.

`python zygote.py` reads a request per line, starts its ranks, kills some of them as it is told, waits until all have
ended, and says how. `Zygote` is the other end.
"""

from __future__ import annotations

import faulthandler
import functools
import gc
import importlib
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from killing import Order, arm, passing

from distaccum.checkpoints.memory_place import VARIABLE
from distaccum.config import TrainConfig
from distaccum.config.compose import compose
from distaccum.errors import EXIT_STATUS, EXIT_UNFINISHED, OtherRankFailedError, UserError
from distaccum.runtime.logs import print_error
from distaccum.training.run import train

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

_SECONDS_FOR_OTHERS = 0.1
"""Between the death of a rank and that of the others, if they are not left to find out by themselves."""

_LIMIT_SECONDS = 120.0
"""What a start may take, before its ranks are aborted."""

_IMPORTED = (
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "victims",
)


@dataclass(frozen=True, slots=True)
class Start:
    """How the ranks of one start ended.

    Attributes:
        statuses: of each rank, negative for a signal.
        was_hit: the point of the order was passed, and the kill followed.
        seconds: from the start to the end of the last rank.
        seconds_after: from the kill to the end of the last rank.
        output: what all starts in the folder have said.
    """

    statuses: list[int]
    was_hit: bool
    seconds: float
    seconds_after: float
    output: str


class Zygote:
    """Starts the training that arguments of `distaccum.train` describe, on as many ranks as are wanted."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def start(
        self, *arguments: str, ranks: int, folder: Path, order: Order | None = None, memory: Sequence[Path] = ()
    ) -> Start:
        """Starts ranks, with the folder as the current one; returns when all of them have ended.

        Args:
            memory: for each node the folder of its memory that outlives processes; equally many ranks are on each.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {
            "arguments": arguments,
            "ranks": ranks,
            "folder": str(folder),
            "order": order and asdict(order),
            "memory": list(map(str, memory)),
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return Start(**answer, output=(folder / "output").read_text(errors="replace"))


@contextmanager
def zygote() -> Iterator[Zygote]:
    """A zygote, for as long as it is needed."""
    path = os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONPATH": path}
    with subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield Zygote(process)
        assert process.stdin is not None
        process.stdin.close()


@functools.cache
def _composed(arguments: tuple[str, ...]) -> TrainConfig:
    # Composing here saves every rank half of the time that its start takes.
    return compose(arguments)


def _serve() -> None:
    torch.set_num_threads(1)
    for module in _IMPORTED:
        importlib.import_module(module)
    gc.freeze()  # no rank need look through what has been imported
    assert len(os.listdir("/proc/self/task")) == 1, "what is forked must not have threads"
    for line in sys.stdin:
        request = json.loads(line)
        order = Order(**request["order"]) if request["order"] else None
        config = _composed(tuple(request["arguments"]))
        launch = _Launch(config, request["ranks"], Path(request["folder"]), order, request["memory"])
        print(json.dumps(launch.run()), flush=True)


class _Launch:
    """One start of the ranks, and their end."""

    def __init__(self, config: TrainConfig, ranks: int, folder: Path, order: Order | None, memory: list[str]) -> None:
        self.order = order
        self.statuses: dict[int, int] = {}
        self.reading, report = os.pipe()
        self.started = time.monotonic()
        port = free_port()
        self.processes = []
        for rank in range(ranks):
            here = {VARIABLE: memory[rank * len(memory) // ranks]} if memory else {}
            self.processes.append(_forked(rank, ranks, port, config, folder, order, report, here))
        os.close(report)

    def run(self) -> dict[str, Any]:
        killed_at = None
        if self.order is not None and self._waits_for_point():
            self._look_until(time.monotonic() + (self.order.delay or 0.0))
            if self.order.rank is not None:
                victims = self.processes if self.order.all_ranks else [self.processes[self.order.rank]]
                self._kill(victims, signal.SIGKILL)
            killed_at = time.monotonic()
            if not self.order.leave_others:
                self._look_until(killed_at + _SECONDS_FOR_OTHERS)
                self._kill(self.processes, signal.SIGKILL)
        self._look_until(self.started + _LIMIT_SECONDS)
        self._abort()
        self._look_until(math.inf)
        os.close(self.reading)
        return {
            "statuses": [self.statuses[process] for process in self.processes],
            "was_hit": killed_at is not None,
            "seconds": time.monotonic() - self.started,
            "seconds_after": time.monotonic() - killed_at if killed_at is not None else 0.0,
        }

    def _waits_for_point(self) -> bool:
        """True once the order's point has been passed; False if the ranks end without."""
        while time.monotonic() < self.started + _LIMIT_SECONDS:
            if select.select([self.reading], [], [], 0.02)[0]:
                # Nothing to read: all writing ends are closed, with the processes that had them.
                return bool(os.read(self.reading, 1))
            self._look()
            if len(self.statuses) == len(self.processes):
                return bool(select.select([self.reading], [], [], 0)[0] and os.read(self.reading, 1))
        return False

    def _look_until(self, time_limit: float) -> None:
        """Waits until all ranks have ended, but not longer."""
        while len(self.statuses) < len(self.processes) and (left := time_limit - time.monotonic()) > 0:
            time.sleep(min(left, 0.005))
            self._look()

    def _look(self) -> None:
        for process in self.processes:
            if process not in self.statuses:
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    self.statuses[process] = os.waitstatus_to_exitcode(status)

    def _abort(self) -> None:
        """Ends what hangs; ranks and their data workers say where they were."""
        left = [process for process in self.processes if process not in self.statuses]
        workers = [worker for rank in left for worker in _children(rank)]
        self._kill(left, signal.SIGABRT)
        for worker in workers:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGABRT)

    def _kill(self, processes: list[int], number: signal.Signals) -> None:
        for process in processes:
            if process not in self.statuses:
                os.kill(process, number)


def _children(process: int) -> list[int]:
    """The processes that any thread of a process has forked."""
    children = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):  # the thread has just ended
            children += [int(child) for child in path.read_text().split()]
    return children


def _forked(
    rank: int,
    ranks: int,
    port: int,
    config: TrainConfig,
    folder: Path,
    order: Order | None,
    report: int,
    variables: dict[str, str],
) -> int:
    """Forks a rank; returns its process number."""
    if process := os.fork():
        return process
    status = 1
    try:
        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        faulthandler.enable()
        os.chdir(folder)
        os.environ |= {"XDG_CACHE_HOME": str(folder / "cache"), **variables}
        if ranks > 1:
            here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            os.environ |= {key: str(value) for key, value in here.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if order is not None and order.rank in (rank, None):
            arm(order, report)
        passing("start")
        status = _trained(config)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _trained(config: TrainConfig) -> int:
    """The exit status of a training that ends by itself."""
    try:
        end = train(config)
    except OtherRankFailedError:
        return EXIT_STATUS
    except UserError as error:
        print_error(str(error))
        return EXIT_STATUS
    return 0 if end.interrupted is None else EXIT_UNFINISHED


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as finder:
        finder.bind(("127.0.0.1", 0))
        return int(finder.getsockname()[1])


if __name__ == "__main__":
    _serve()
