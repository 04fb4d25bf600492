"""Runs that are killed again and again, with `kill -9`, come to the same bits as one that never was."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
from killing import Order
from runs import RUN, assert_each_update_once, lines_of, results, undisturbed
from zygote import Zygote

from distaccum.checkpoints import checkpoints_in
from distaccum.errors import EXIT_STATUS


def at_random(seed: int, ranks: int, count: int) -> list[Order]:
    """Kills at any instant: some time after the start of a process, or after one of its forwards."""
    chance = random.Random(seed)
    orders = []
    for _ in range(count):
        point, last, longest_delay = chance.choice([("start", 1, 0.6), ("forward", 20, 0.1), ("forward", 20, 0.1)])
        orders.append(
            Order(
                point=point,
                nth=chance.randint(1, last),
                rank=chance.randrange(ranks),
                delay=chance.uniform(0.0, longest_delay),
                all_ranks=chance.random() < 0.5,
            )
        )
    return orders


WHILE_SAVING = [
    Order(point="half of rank-#.safetensors", nth=1),
    Order(point="half of rank-#.safetensors", nth=4),
    Order(point="after fsync rank-#.safetensors", nth=2),
    Order(point="before fsync manifest.json", nth=3),
    Order(point="after fsync manifest.json", nth=2),
    Order(point="before rename .writing-#", nth=3),
    Order(point="after rename .writing-#", nth=3),
    Order(point="before fsync checkpoints", nth=2),
    Order(point="before rename update-#", nth=2),
    Order(point="after rename update-#", nth=1),
    Order(point="after unlink manifest.json", nth=1),
    Order(point="half of metrics.jsonl", nth=15),
    Order(point="half of metrics.jsonl", nth=10),
]
WHILE_GOING_ON = [
    Order(point="before truncate metrics.jsonl"),
    Order(point="after truncate metrics.jsonl"),
    Order(point="after set_rng_state"),
]
WHILE_ENDING = [
    Order(point="half of .model.safetensors"),
    Order(point="before rename .model.safetensors"),
    Order(point="after rename .model.safetensors"),
]


WARNINGS = ("is damaged", "came twice", "lacks lines", "were no JSON objects", "can't be ")


def killed(processes: Zygote, folder: Path, *settings: str, ranks: int, orders: list[Order]) -> None:
    """Makes a run that is killed by one order after another, and then left alone."""
    folder.mkdir()
    for order in orders:
        start = processes.start(*RUN, *settings, ranks=ranks, folder=folder, order=order)
        assert start.was_hit, f"{order} was not reached\n{start.output}"
        assert start.statuses[order.rank] == -signal.SIGKILL, f"{order}: {start.statuses}\n{start.output}"
        if order.leave_others:
            others = {status for rank, status in enumerate(start.statuses) if rank != order.rank}
            assert others == {EXIT_STATUS}, f"{order}: {start.statuses}\n{start.output}"
            assert f"rank {order.rank} is gone: killed" in start.output
            assert start.seconds_after < 30
    start = processes.start(*RUN, *settings, ranks=ranks, folder=folder)
    assert start.statuses == [0] * ranks, start.output
    # What is half-written is no checkpoint at all, and no line: there is nothing to be mended.
    assert not [warning for warning in WARNINGS if warning in start.output], start.output


DDP = [
    Order(point="forward", nth=13, rank=1),
    Order(point="backward", nth=18, rank=0, leave_others=True),
    Order(point="before all_reduce", nth=11, rank=1),
    Order(point="after all_reduce", nth=14, rank=0),
    Order(point="after all_reduce", nth=17, rank=1, leave_others=True),
    Order(point="forward of an evaluation", nth=2, rank=0),
    *WHILE_SAVING,
    *WHILE_GOING_ON,
    *at_random(seed=0, ranks=2, count=20),
    *WHILE_ENDING,
]
FSDP = [
    Order(point="backward", nth=15, rank=1),
    Order(point="half of rank-#.safetensors", nth=2, rank=1),
    Order(point="after rename .writing-#", nth=2),
    *at_random(seed=1, ranks=2, count=3),
    *WHILE_ENDING[:1],
]
SINGLE = [*at_random(seed=2, ranks=1, count=8), *WHILE_ENDING[:2]]


def test_there_are_enough_kills() -> None:
    """All of which happen, as the tests below see to."""
    orders = [*DDP, *FSDP, *SINGLE]
    assert len(orders) >= 60
    assert sum(order.delay is not None for order in orders) >= 30


@pytest.mark.parametrize(
    ("strategy", "ranks", "updates", "orders"),
    [("ddp", 2, 400, DDP), ("fsdp", 2, 120, FSDP), ("single", 1, 250, SINGLE)],
    ids=["ddp", "fsdp", "single"],
)
def test_a_run_that_is_killed_comes_to_the_same_bits(
    processes: Zygote, tmp_path: Path, strategy: str, ranks: int, updates: int, orders: list[Order]
) -> None:
    settings = (f"strategy={strategy}", f"train.max_updates={updates}")
    weights, lines = undisturbed(processes, tmp_path / "undisturbed", *RUN, *settings, ranks=ranks)
    assert_each_update_once(lines, updates)
    killed(processes, tmp_path / "killed", *settings, ranks=ranks, orders=orders)
    same_weights, same_lines = results(tmp_path / "killed")
    assert_each_update_once(same_lines, updates)
    assert same_lines == lines
    assert same_weights == weights


def test_a_run_that_goes_on_with_another_generator_state_is_noticed(processes: Zygote, tmp_path: Path) -> None:
    """The comparison can fail: one number more drawn is enough."""
    settings = ("strategy=single", "train.max_updates=20")
    weights, lines = undisturbed(processes, tmp_path / "undisturbed", *RUN, *settings, ranks=1)
    (tmp_path / "killed").mkdir()
    order = Order(point="forward", nth=50)
    assert processes.start(*RUN, *settings, ranks=1, folder=tmp_path / "killed", order=order).was_hit
    assert checkpoints_in(tmp_path / "killed" / "run" / "checkpoints")
    start = processes.start(*RUN, *settings, "+model.draws_once_more=true", ranks=1, folder=tmp_path / "killed")
    assert start.statuses == [0], start.output
    other_weights, other_lines = results(tmp_path / "killed")
    assert_each_update_once(other_lines, 20)
    assert other_lines != lines
    assert other_weights != weights


def test_a_kill_while_a_window_in_the_middle_is_saved_costs_the_window_alone(processes: Zygote, tmp_path: Path) -> None:
    """The state after the last update is on the disk before the gradients are written beside it."""
    long = ("strategy=single", "batch.global_batch_size=144", "train.max_updates=2", "+model.stops_in=30")
    settings = (*RUN, *long, "model.seconds=0.01", "checkpoint.every_updates=100", "checkpoint.grace_seconds=0.05")
    for point in ("half of rank-#.safetensors", "after rename update-#"):
        folder = tmp_path / point
        folder.mkdir()
        nth = 2 if point.startswith("half") else 1
        start = processes.start(*settings, ranks=1, folder=folder, order=Order(point=point, nth=nth))
        assert start.was_hit, start.output
        assert (folder / "stopped").exists()
        start = processes.start(*settings, ranks=1, folder=folder)
        assert start.statuses == [0], start.output
        assert "resumed        after update 1" in start.output, start.output
        assert_each_update_once(lines_of(folder), 2)
    (tmp_path / "undisturbed").mkdir()
    (tmp_path / "undisturbed" / "stopped").touch()
    start = processes.start(*settings, ranks=1, folder=tmp_path / "undisturbed")
    assert start.statuses == [0], start.output
    for folder in (tmp_path / "half of rank-#.safetensors", tmp_path / "after rename update-#"):
        assert results(folder) == results(tmp_path / "undisturbed")
