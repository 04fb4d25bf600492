"""Runs that keep their newest states in memory: `kill -9` of a rank or the loss of a node costs one update at most."""

from __future__ import annotations

import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from killing import Order
from runs import RUN, assert_each_update_once, lines_of, results, undisturbed
from test_kills import at_random
from zygote import Start, Zygote

from distaccum.checkpoints import checkpoints_in

SETTINGS = [*RUN, "data.num_workers=0", "checkpoint.every_updates=null", "checkpoint.memory_every_updates=1"]
"""No checkpoint is saved on the disk before the end."""


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory that outlives processes, with one for each of two nodes."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for node in ("0", "1"):
            Path(folder, node).mkdir()
        yield Path(folder)


def states_in(memory: Path) -> list[Path]:
    """States that are whole there, as far as their names say, the newest first."""
    return [path for root in memory.glob("distaccum-*/*") for path in checkpoints_in(root)]


def updates_of(folder: Path) -> int:
    """How many updates a run has reported."""
    return len([line for line in lines_of(folder) if "eval" not in line])


class Killed:
    """A run that is killed again and again."""

    def __init__(self, processes: Zygote, folder: Path, *settings: str, ranks: int, memory: list[Path]) -> None:
        self._processes, self._settings, self._memory = processes, settings, memory
        self.folder, self._ranks = folder, ranks
        self._resumed = self._before = 0
        folder.mkdir()

    def start(self, order: Order | None = None) -> Start:
        """Starts it once more; checks that no more than one update had been lost before."""
        start = self._processes.start(
            *self._settings, ranks=self._ranks, folder=self.folder, order=order, memory=self._memory
        )
        found = [int(update) for update in re.findall(r"going on from .*, update (\d+)", start.output)]
        if len(found) > self._resumed:
            assert found[-1] >= self._before - 1, start.output
        else:  # the run has started over, or was killed before it said
            assert self._before <= 1 or (order is not None and order.point == "start"), start.output
        self._resumed, self._before = len(found), max(updates_of(self.folder), self._before)
        return start

    def kill(self, order: Order) -> None:
        start = self.start(order)
        assert start.was_hit, f"{order} was not reached\n{start.output}"
        assert start.statuses[order.rank] == -signal.SIGKILL, f"{order}: {start.statuses}\n{start.output}"

    def finish(self) -> Start:
        start = self.start()
        assert start.statuses == [0] * self._ranks, start.output
        return start


AT_POINTS = [
    Order(point="forward", nth=30),
    Order(point="half of rank-#.safetensors", nth=6),
    Order(point="after fsync rank-#.safetensors", nth=4),
    Order(point="after fsync manifest.json", nth=4),
    Order(point="before rename .writing-#", nth=3),
    Order(point="after rename .writing-#", nth=3),
    Order(point="half of metrics.jsonl", nth=9),
]
SHARDED = [Order(point="backward", nth=15, rank=1), Order(point="half of rank-#.safetensors", nth=5, rank=1)]
ZERO_1 = ("strategy=ddp", "strategy.shard_optimizer=true")


@pytest.mark.parametrize(
    ("strategy", "ranks", "updates", "orders"),
    [
        (("strategy=single",), 1, 90, [*AT_POINTS, *at_random(seed=3, ranks=1, count=4)]),
        (("strategy=ddp",), 2, 90, [*AT_POINTS[3:], *at_random(seed=4, ranks=2, count=4)]),
        (ZERO_1, 2, 50, [*SHARDED, *at_random(seed=5, ranks=2, count=2)]),
        (("strategy=fsdp",), 2, 50, [*SHARDED, *at_random(seed=6, ranks=2, count=2)]),
    ],
    ids=["single", "ddp", "zero-1", "fsdp"],
)
def test_a_killed_rank_costs_an_update_at_most(
    processes: Zygote,
    tmp_path: Path,
    memory: Path,
    strategy: tuple[str, ...],
    ranks: int,
    updates: int,
    orders: list[Order],
) -> None:
    settings = [*SETTINGS, *strategy, f"train.max_updates={updates}"]
    wanted = undisturbed(
        processes, tmp_path / "undisturbed", *settings, "checkpoint.memory_every_updates=null", ranks=ranks
    )
    run = Killed(processes, tmp_path / "killed", *settings, ranks=ranks, memory=[memory])
    for order in orders:
        run.kill(order)
        assert not checkpoints_in(run.folder / "run" / "checkpoints")
    start = run.finish()
    assert results(run.folder) == wanted
    assert_each_update_once(wanted[1], updates)
    assert "in memory is not whole" not in start.output
    assert not list(memory.glob("distaccum-*")), "it is cleared at the end"
    assert not (run.folder / "run" / "checkpoints" / "memory.id").exists()
