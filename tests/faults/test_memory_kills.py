"""Runs that keep their newest states in memory: `kill -9` of a rank or the loss of a node costs one update at most."""

from __future__ import annotations

import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from agents import Agent, elastic_options, wait_for
from killing import Order
from runs import RUN, assert_each_update_once, lines_of, results, undisturbed
from test_kills import at_random
from zygote import Start, Zygote

from distaccum.checkpoints import checkpoints_in
from distaccum.checkpoints.memory_place import VARIABLE

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


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


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
        (("strategy=single",), 1, 50, [*AT_POINTS[:5], *at_random(seed=3, ranks=1, count=1)]),
        (("strategy=ddp",), 2, 40, [*AT_POINTS[-2:], *at_random(seed=4, ranks=2, count=2)]),
        (ZERO_1, 2, 24, SHARDED),
        (("strategy=fsdp",), 2, 24, SHARDED),
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


LOST = [
    (1, Order(point="half of rank-#.safetensors", nth=5, rank=1)),
    (0, Order(point="after rename .writing-#", nth=4, rank=0)),
    (None, Order(point="backward", nth=12, rank=0, delay=0.02, all_ranks=True)),
]
"""Which node is lost; none, but a file in its memory is damaged."""


@pytest.mark.parametrize(
    ("strategy", "ranks", "lost"),
    [(("strategy=fsdp",), 4, LOST[:1]), (ZERO_1, 2, LOST), (("strategy=ddp",), 2, LOST[:1])],
    ids=["fsdp", "zero-1", "ddp"],
)
def test_a_lost_node_costs_an_update_at_most(
    processes: Zygote,
    tmp_path: Path,
    memory: Path,
    strategy: tuple[str, ...],
    ranks: int,
    lost: list[tuple[int | None, Order]],
) -> None:
    """All its ranks are killed, and its memory is gone: of what it had written, the other node has a copy."""
    settings = [*SETTINGS, *strategy, "train.max_updates=24"]
    wanted = undisturbed(
        processes, tmp_path / "undisturbed", *settings, "checkpoint.memory_every_updates=null", ranks=ranks
    )
    nodes = [memory / "0", memory / "1"]
    run = Killed(processes, tmp_path / "killed", *settings, ranks=ranks, memory=nodes)
    for node, order in lost:
        run.kill(order)
        if node is None:
            # All ranks are killed at any moment: the newest state of a node may not have come to the other one.
            copied = {state.name for state in states_in(nodes[1])}
            newest = next(state for state in states_in(nodes[0]) if state.name in copied)
            flip_byte(newest / "rank-00000.safetensors")
        else:
            shutil.rmtree(nodes[node])
            nodes[node].mkdir()
    start = run.finish()
    assert start.output.count("going on from run/checkpoints/update-") == len(lost), start.output
    assert "in memory is not whole" not in start.output
    assert results(run.folder) == wanted
    assert not list(memory.glob("*/distaccum-*"))


def test_torchruns_go_on_from_memory_when_one_is_lost_with_its_node(
    processes: Zygote, tmp_path: Path, memory: Path
) -> None:
    """The ranks of the one that is left are restarted in place, beside those of a new node."""
    settings = [*SETTINGS, "strategy=fsdp", "train.max_updates=20"]
    wanted = undisturbed(
        processes, tmp_path / "undisturbed", *settings, "checkpoint.memory_every_updates=null", ranks=2
    )
    folder = tmp_path / "killed"
    folder.mkdir()
    command = ["--max-restarts=3", "-m", "distaccum.train", *settings, "model.seconds=0.05"]
    options = elastic_options(2, nodes="2")
    for entry in options:
        # A node that is lost is given up after so many seconds.
        entry[-2] = entry[-2].replace("last_call_timeout=5", "keep_alive_interval=1,keep_alive_max_attempt=3")
    with ExitStack() as stack:

        def start(number: int, node: str) -> Agent:
            (memory / node).mkdir(exist_ok=True)
            variables = {VARIABLE: str(memory / node), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
            agent = Agent(*options[number], *command, folder=folder, name=node, **variables)
            stack.callback(agent.kill_all)
            return agent

        stays, goes = start(0, "0"), start(1, "1")
        wait_for(lambda: updates_of(folder) >= 5, [stays, goes])
        goes.kill_all()
        shutil.rmtree(memory / "1")
        before = updates_of(folder)
        comes = start(1, "2")
        (folder / "hurry").touch()
        assert stays.process.wait(60) == 0, stays.output + comes.output
        assert comes.process.wait(60) == 0, stays.output + comes.output
        (found,) = re.findall(r"going on from run/checkpoints/update-(\d+)", stays.output + comes.output)
    assert int(found) >= before - 1
    assert results(folder) == wanted
    assert not list(memory.glob("*/distaccum-*"))
