"""Training processes that start at once, forked from one that has imported everything, and that can be troubled.

`python starting.py` reads a request per line and answers with one: it forks ranks, or waits for some to end. `Starter`
is the other end, in the test.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import math
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distaccum.errors import EXIT_STATUS

HERE = Path(__file__).parent
TESTS = HERE.parent
ROOT = TESTS.parent

_LIMIT_SECONDS = 90.0
_IMPORTED = (
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.nn.parallel",
    "distaccum.training.run",
    "troubles",
)

RUN = (
    "data=custom",
    "data.train._target_=troubles.Points",
    "+data.train.num_samples=100",
    "+data.evaluation._target_=troubles.Points",
    "+data.evaluation.num_samples=20",
    "model=custom",
    "model._target_=troubles.Net",
    "batch.global_batch_size=12",
    "batch.micro_batch_size=2",
    "train.max_updates=8",
    "train.eval_every=3",
    "checkpoint.every_updates=2",
    "run_dir=run",
    "wandb.mode=disabled",
)
"""8 updates of 6 micro-steps on one rank, of 3 on two, with evaluations after the 3rd, 6th and 8th."""

STEPS = 6
"""Micro-steps of an update on one rank."""


def environment(**more: str) -> dict[str, str]:
    """What training processes get."""
    path = os.pathsep.join([str(ROOT), str(HERE), str(TESTS), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONPATH": path, **more}


@dataclass(frozen=True, slots=True)
class Ended:
    """How the ranks of one start ended.

    Attributes:
        statuses: of each rank, negative for a signal.
        out, err: what all of them wrote.
    """

    statuses: list[int]
    out: str
    err: str

    @property
    def message(self) -> str:
        """The one message of a run that was refused: said by one rank, with status 2 and without a traceback."""
        assert {2} <= set(self.statuses) <= {2, -signal.SIGTERM}, self
        assert "Traceback" not in self.out + self.err, self.err
        said = re.findall("^error: (.+)$", self.err, re.MULTILINE)
        assert len(said) == 1, self
        return str(said[0])


@dataclass(slots=True)
class Running:
    """Ranks that have been started."""

    pids: list[int]
    ended: Callable[[], Ended] = field(repr=False)
    """Waits for their end."""


class Starter:
    """Starts `distaccum.train` in a process per rank."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def _ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self, *arguments: str, ranks: int = 1, troubles: list[dict[str, Any]] | None = None, **variables: str
    ) -> Running:
        """Starts ranks of `distaccum.train` in the current folder; returns at once.

        Args:
            troubles: what befalls them.
            variables: of their environment.
        """
        variables["TROUBLES"] = json.dumps(troubles or [])
        outputs = tempfile.mkdtemp(prefix="output-", dir=os.getcwd())
        command = ("-m", "distaccum.train", *arguments)
        return self.start_command(*command, ranks=ranks, outputs=outputs, launched=ranks > 1, **variables)

    def start_command(
        self, *command: str, ranks: int, outputs: str, launched: bool = True, **variables: str
    ) -> Running:
        """Starts ranks of any Python command in the current folder; returns at once.

        Args:
            command: what comes after `python`: `-m` and a module, or a file.
            outputs: an empty folder, for what the ranks write.
            launched: tell each rank which one it is, as launchers do.
            variables: of their environment.
        """
        for kind, rank in itertools.product(("out", "err"), range(ranks)):
            Path(outputs, f"{kind}{rank}").touch()
        pids = self._ask(
            command=command, ranks=ranks, launched=launched, folder=os.getcwd(), outputs=outputs, variables=variables
        )

        def ended() -> Ended:
            statuses = self._ask(wait=pids)
            texts = [[Path(outputs, f"{kind}{rank}").read_text() for rank in range(ranks)] for kind in ("out", "err")]
            return Ended(statuses, "".join(texts[0]), "".join(texts[1]))

        return Running(pids, ended)

    def run(self, *arguments: str, **more: Any) -> Ended:
        """Starts ranks and waits for their end."""
        return self.start(*arguments, **more).ended()


@contextmanager
def starter() -> Iterator[Starter]:
    with subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as process:
        yield Starter(process)
        assert process.stdin is not None
        process.stdin.close()


def _serve() -> None:
    torch.set_num_threads(1)
    for module in _IMPORTED:
        importlib.import_module(module)
    from distaccum.config.compose import compose

    compose(RUN)
    gc.freeze()
    assert len(os.listdir("/proc/self/task")) == 1, "what is forked must not have threads"
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(_waited(request["wait"]) if "wait" in request else _forked(**request)), flush=True)


def _waited(pids: list[int]) -> list[int]:
    """Statuses of processes, which are killed if they take too long.

    When one has failed, the others are asked to stop a moment later, as launchers do.
    """
    statuses: dict[int, int] = {}
    limit, stop_at = time.monotonic() + _LIMIT_SECONDS, math.inf
    while len(statuses) < len(pids):
        if EXIT_STATUS in statuses.values() and stop_at == math.inf:
            stop_at = time.monotonic() + 0.5
        if time.monotonic() > stop_at:
            for pid in set(pids) - set(statuses):
                os.kill(pid, signal.SIGTERM)
            stop_at = limit
        for pid in set(pids) - set(statuses):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                statuses[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > limit:
                os.kill(pid, signal.SIGABRT)
        time.sleep(0.005)
    return [statuses[pid] for pid in pids]


def _forked(
    command: list[str], ranks: int, launched: bool, folder: str, outputs: str, variables: dict[str, str]
) -> list[int]:
    """Forks ranks; returns their process numbers."""
    with socket.socket() as finder:
        finder.bind(("127.0.0.1", 0))
        port = finder.getsockname()[1]
    pids = []
    for rank in range(ranks):
        if pid := os.fork():
            pids.append(pid)
            continue
        try:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, kind in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{outputs}/{kind}{rank}", os.O_WRONLY), number)
            os.chdir(folder)
            os.environ |= variables
            if launched:
                here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
                os.environ |= {key: str(value) for key, value in here.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            _run(command)
        finally:
            os._exit(70)
    return pids


def _run(command: list[str]) -> None:
    """Runs what comes after `python`, and ends the process with its status, as the interpreter would."""
    sys.path[:0] = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry not in sys.path]
    status = 0
    try:
        if command[0] == "-m":
            sys.path.insert(0, os.getcwd())
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(command[0]).parent))
            sys.argv = command
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve()
