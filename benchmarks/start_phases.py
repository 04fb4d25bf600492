"""Runs `distaccum.train` in this process, and writes where its time went: `python start_phases.py FOLDER OVERRIDE…`.

The package's functions are wrapped from outside. Time counts for the innermost of them that runs.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class PhaseClock:
    """Adds up the seconds of phases, and those of the CPU, from the start of the process on.

    Attributes:
        seconds: by phase, in the order in which they first came: seconds, and CPU seconds of all threads.
        ends: when a phase ended for the first time, as `time.time()`.
    """

    def __init__(self, first: str) -> None:
        self.started = _process_start()
        self.seconds: dict[str, list[float]] = {}
        self.ends: dict[str, float] = {}
        self._open = [first]
        self._since = (self.started, 0.0)

    def _settle(self) -> None:
        now = (time.time(), time.process_time())
        spent = self.seconds.setdefault(self._open[-1], [0.0, 0.0])
        for index, (end, begin) in enumerate(zip(now, self._since, strict=True)):
            spent[index] += end - begin
        self._since = now

    def go_to(self, name: str) -> None:
        """Ends the outermost phase, and begins another one in its place."""
        self._settle()
        self._open[-1] = name

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Is inside a phase."""
        self._settle()
        self._open.append(name)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()
            self.ends.setdefault(name, time.time())

    def wrap(self, owner: Any, name: str, phases: str | Iterable[str]) -> None:
        """Makes calls of a function a phase; of several phases, each call takes the next one."""
        inner, names = getattr(owner, name), itertools.repeat(phases) if isinstance(phases, str) else iter(phases)

        @functools.wraps(inner)
        def timed(*arguments: Any, **keywords: Any) -> Any:
            with self.phase(next(names)):
                return inner(*arguments, **keywords)

        setattr(owner, name, timed)

    def write(self, path: Path) -> None:
        """Writes what has been found."""
        self._settle()
        found = {"started": self.started, "ended": time.time(), "seconds": self.seconds, "ends": self.ends}
        path.write_text(json.dumps(found))


def _process_start() -> float:
    """Returns when the process was started, to a hundredth of a second; where that isn't known, now."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return time.time()
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Runs the command on one rank."""
    clock = PhaseClock("start of Python")
    folder, rank = Path(sys.argv[1]), os.environ.get("RANK", "0")
    sys.argv[1:2] = []
    clock.go_to("import hydra, rich")
    from distaccum import cli, train

    clock.go_to("configuration")
    inner = train._run

    def timed_run(config: Any) -> Any:
        with clock.phase("import torch"), train.quick_imports():
            importlib.import_module("torch")
            with clock.phase("import torch._dynamo"):
                importlib.import_module("torch._dynamo")
            with clock.phase("import the rest"):
                importlib.import_module("distaccum.training.run")
        _watch(clock)
        clock.go_to("run folder, other")
        return inner(config)

    train._run = timed_run
    leave = cli.leave

    def leave_and_write(status: int) -> None:
        clock.write(folder / f"rank{rank}.json")
        leave(status)

    cli.leave = leave_and_write
    train.main()


def _watch(clock: PhaseClock) -> None:
    """Makes phases of the package's functions."""
    from distaccum.accumulation import accumulator
    from distaccum.runtime.world import World
    from distaccum.training import build, run
    from distaccum.training.trainer import Trainer
    from distaccum.training.update import Updater

    for name in ("__init__", "init_process_group"):
        clock.wrap(World, name, "connecting the ranks")
    clock.wrap(run, "check_same_config", "connecting the ranks")
    clock.wrap(World, "leave", "leaving the ranks")
    clock.wrap(build, "Parts", "data and task")
    clock.wrap(build, "build_model_that_fits", "model")
    clock.wrap(build, "_placed", "placing the model")
    clock.wrap(build, "_built_optimizer", "optimizer")
    clock.wrap(build, "build_observers", "observers")
    clock.wrap(Trainer, "_report_start", "observers")
    clock.wrap(accumulator, "micro_step", _first("first micro-step", "later updates"))
    clock.wrap(Updater, "update", _first("rest of first update", "later updates"))
    clock.wrap(Trainer, "_report_update", "observers")
    clock.wrap(Trainer, "_evaluate", "evaluations")
    clock.wrap(Trainer, "_save_at_the_end", "checkpoint, export")
    clock.wrap(Trainer, "fit", "closing observers")


def _first(name: str, later: str) -> Iterable[str]:
    return itertools.chain([name], itertools.repeat(later))


if __name__ == "__main__":
    main()
