"""How long does a run stand still when a rank is killed?

    python benchmarks/restart.py

The digits on 2 ranks, with a checkpoint after each update and --max-restarts: rank 1 is killed (`kill -9`) in the midst
of training. All in seconds, medians of kills in runs of both launchers that take turns.

  torchrun           `torchrun --max-restarts=… -m distaccum.train`: each rank is a new Python that imports everything
  distaccum.launch   `python -m distaccum.launch --max-restarts=…`: ranks are forked from a process that has

`start` is from the command to the first update. The other columns count from the kill: until the other rank has ended,
having said which one is gone; until new ranks have met and found the checkpoint; until an update is done that was not
done before.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import common

LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=9"],
    "distaccum.launch": ["-m", "distaccum.launch", "--nproc_per_node=2", "--max-restarts=9"],
}
SETTINGS = ["train.epochs=null", "train.max_updates=1000000", "train.eval_every=null", "checkpoint.every_updates=1"]
PATIENCE_SECONDS = 300.0


class Run:
    """A training that goes on until it is stopped, seen by its files."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes]) -> None:
        self.folder = folder
        self._process = process
        self._since = time.monotonic()

    def updates(self) -> int:
        """The last update so far."""
        lines = self._text("metrics.jsonl").splitlines(keepends=True)
        return max((json.loads(line)["update"] for line in lines if line.endswith("\n")), default=0)

    def rank(self, number: int) -> int:
        """The process number of a rank, from its log."""
        return int(re.findall(r"\(process (\d+) on ", self._text(f"logs/rank{number}.log"))[-1])

    def restores(self) -> int:
        return self._text("logs/rank0.log").count("going on from")

    def seconds_until(self, condition: Callable[[], bool]) -> float:
        """Waits for something; returns the seconds since the start, or since the last kill."""
        while not condition():
            if self._process.poll() is not None or time.monotonic() - self._since > PATIENCE_SECONDS:
                raise SystemExit(f"the run has ended, or does not go on:\n{self._text('output')}")
            time.sleep(0.01)
        return time.monotonic() - self._since

    def kill(self) -> list[float]:
        """Kills rank 1; returns the seconds until the other one has ended, a checkpoint is found, an update is done."""
        survivor, restores = self.rank(0), self.restores()
        os.kill(self.rank(1), signal.SIGKILL)
        self._since = time.monotonic()
        ended = self.seconds_until(lambda: not _runs(survivor))
        updates = self.updates()  # not before: it may still have made one
        return [
            ended,
            self.seconds_until(lambda: self.restores() > restores),
            self.seconds_until(lambda: self.updates() > updates),
        ]

    def _text(self, name: str) -> str:
        path = self.folder / name
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@contextmanager
def running(launcher: str) -> Iterator[Run]:
    """A run under a launcher, until the end of the block."""
    with tempfile.TemporaryDirectory() as name, open(Path(name) / "output", "wb") as output:
        words = [sys.executable, *LAUNCHERS[launcher], *(["-m", "distaccum.train"] if launcher == "torchrun" else [])]
        environment = {**common.ENVIRONMENT, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [*words, *SETTINGS, f"run_dir={name}"], stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            yield Run(Path(name), process)
        finally:
            process.terminate()
            process.wait()


def measured(launcher: str, kills: int) -> list[list[float]]:
    """Returns, of each kill, the seconds of the start of its run and those after it."""
    with running(launcher) as run:
        start = run.seconds_until(lambda: run.updates() >= 1)
        found = []
        for _ in range(kills):
            updates = run.updates()
            run.seconds_until(lambda updates=updates: run.updates() >= updates + 20)  # type: ignore[misc]
            found.append([start, *run.kill()])
    return found


def rows(launchers: list[str], rounds: int, kills: int) -> Iterator[common.Row]:
    found: dict[str, list[list[float]]] = {launcher: [] for launcher in launchers}
    for _ in common.rounds(rounds, "round"):
        for launcher, seconds in found.items():
            seconds += measured(launcher, kills)
    for launcher, seconds in found.items():
        start, survivor, checkpoint, update = (statistics.median(column) for column in zip(*seconds, strict=True))
        yield {
            "launcher": launcher,
            "start": start,
            "other rank ended": survivor,
            "checkpoint found": checkpoint,
            "next update": update,
            "longest": max(row[-1] for row in seconds),
            "kills": len(seconds),
        }


def main() -> None:
    options = common.begin(common.arguments(__doc__, quick="10 seconds", full="3 minutes"))
    launchers, rounds, kills = (["distaccum.launch"], 1, 1) if options.quick else ([*LAUNCHERS], 2, 3)
    found = common.show("A rank is killed, in seconds", rows(launchers, rounds, kills))
    if options.write:
        common.write(__doc__, found)


if __name__ == "__main__":
    main()
