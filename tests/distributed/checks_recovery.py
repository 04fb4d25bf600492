"""Checks of going on when memory runs out, on real ranks: each point of a window × each rank."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from examples import CollectiveCounter, distance, flat, replaced
from injection import Fragile, Vectors, task
from torch import nn

from distaccum import Accumulator, LoaderOptions, UpdateResult, UserError, WindowLoader
from distaccum.accumulation.open_window import OpenWindow
from distaccum.accumulation.recovery import Recovery
from distaccum.config import DDPConfig
from distaccum.config.enums import Compression
from distaccum.runtime.world import World
from distaccum.strategies.ddp import place_ddp

UPDATES = 4
STRUCK = 2
"""The update in which memory runs out (from 1): DDP lays out its buckets anew between the first and the second."""
POINTS = [
    *itertools.product(("forward",), ("begin", "middle", "end", "loss")),
    *itertools.product(("backward",), ("end", "middle", "begin")),
]


def _train(
    world: World,
    *,
    strike: tuple[int, int, str, str, int] | None = None,
    counts: bool = False,
    config: DDPConfig | None = None,
    optimizer: Any = None,
    options: dict[str, Any] | None = None,
    recovers: bool = True,
    scaler: torch.amp.GradScaler | None = None,
    prepare: Any = None,
    **batch: Any,
) -> tuple[list[UpdateResult], torch.Tensor, list[int], int]:
    """Trains; with `strike` (rank, update, direction, point, micro-step), memory runs out there."""
    torch.manual_seed(3)
    module = Fragile(counts=counts).double()
    if prepare is not None:
        prepare(module)
    strategy = place_ddp(module, config or DDPConfig(bucket_cap_mb=0.0003), torch.device("cpu"))
    sizes: list[int] = []
    accumulator = Accumulator(
        strategy.model,
        (optimizer or (lambda p: torch.optim.AdamW(p, lr=3e-2)))(list(strategy.model.parameters())),
        clip_norm=1.0,
        strategy=strategy,
        scaler=scaler,
        recovery=Recovery(on_smaller=sizes.append) if recovers else None,
    )
    loader = WindowLoader(
        Vectors(), seed=1, **{"global_batch_size": 16, "micro_batch_size": 4, **batch}, **(options or {})
    )
    results: list[UpdateResult] = []
    try:
        while len(results) < UPDATES:
            for window in loader:
                if strike is not None and strike[:2] == (world.rank, len(results) + 1):
                    module.faults.nth(strike[4], *strike[2:4])
                results.append(accumulator.run(window, lambda batch: task(strategy.model, batch)))
                assert accumulator.updates == len(results)
                if len(results) == UPDATES:
                    break
    finally:
        loader.close()
    return results, flat(module), sizes, module.faults.raised


def _assert_same(found: Any, wanted: Any, what: Any) -> None:
    for key in ("loss", "grad_norm", "weight"):
        mine, reference = ([getattr(result, key) for result in results] for results in (found[0], wanted[0]))
        assert distance(mine, reference) < 1e-12, (what, key)
    assert distance(found[1], wanted[1]) < 1e-12, what
    correct = [[float(result.sums["correct"]) for result in results] for results in (found[0], wanted[0])]
    assert correct[0] == correct[1], what


def _strike_everywhere(world: World, steps: int, points: Any = tuple(POINTS), **options: Any) -> None:
    wanted = _train(world, **options)
    for rank, (direction, point), step in itertools.product(range(world.world_size), points, range(1, steps + 1)):
        strike = (rank, STRUCK, direction, point, step)
        found = _train(world, strike=strike, **options)
        assert found[3] == (world.rank == rank), (strike, "memory has run out once, on that rank only")
        _assert_same(found, wanted, strike)
        assert len(found[2]) == (world.rank == rank), (strike, found[2])


def check_every_point_of_a_window(world: World) -> None:
    """Two micro-steps a rank: forward, loss and backward of both, before the first bucket and after the last one."""
    _strike_everywhere(world, steps=2)


def check_every_point_of_a_window_of_one_micro_step(world: World) -> None:
    """In the first update too, before DDP has laid out its buckets anew, and without any gradient there yet."""
    wanted = _train(world, micro_batch_size=8)
    for rank, update, (direction, point) in itertools.product(range(world.world_size), (1, 2), POINTS):
        strike = (rank, update, direction, point, 1)
        found = _train(world, strike=strike, micro_batch_size=8)
        assert found[3] == (world.rank == rank)
        _assert_same(found, wanted, strike)


FEW = [("forward", "end"), ("backward", "middle"), ("backward", "begin")]


def check_a_model_with_buffers(world: World) -> None:
    _strike_everywhere(world, steps=2, points=FEW, counts=True)


def check_other_ways_to_sync(world: World) -> None:
    for config in (
        DDPConfig(bucket_cap_mb=0.0003, gradient_as_bucket_view=False),
        DDPConfig(bucket_cap_mb=0.0003, find_unused_parameters=True),
        DDPConfig(),  # one bucket
        DDPConfig(compression=Compression.powersgd, powersgd_start_update=2),
        DDPConfig(bucket_cap_mb=0.0003, compression=Compression.powersgd, powersgd_start_update=2),
    ):
        _strike_everywhere(world, steps=2, points=[("backward", "middle")], config=config)


def check_an_optimizer_of_a_part_of_the_model(world: World) -> None:
    """The first layer is not its own: what is missing there alone would be seen by nobody."""
    _strike_everywhere(
        world,
        steps=2,
        points=[("backward", "begin"), ("backward", "middle")],
        optimizer=lambda parameters: torch.optim.AdamW(parameters[2:], lr=3e-2),
    )


def check_an_unused_first_parameter_gets_no_gradient(world: World) -> None:
    """Neither from what holds the sync open for the last, nor from a sync that is brought to its end."""

    def with_spare(module: Fragile) -> None:
        module.spare = nn.Parameter(torch.ones(2, dtype=torch.float64))  # a root's own come first

    for views in (True, False):
        config = DDPConfig(bucket_cap_mb=0.0003, find_unused_parameters=True, gradient_as_bucket_view=views)
        wanted = _train(world, config=config, prepare=with_spare, recovers=False)
        for strike in (None, (1, 1, "backward", "middle", 2), (1, STRUCK, "backward", "middle", 2)):
            found = _train(world, config=config, prepare=with_spare, strike=strike)
            assert torch.equal(found[1][:2], torch.ones(2, dtype=torch.float64)), (views, strike)
            _assert_same(found, wanted, strike)


def check_by_length_and_with_workers(world: World) -> None:
    by_length = {"lengths": Vectors().lengths, "max_tokens": 20, "micro_batch_size": None}
    options = LoaderOptions(num_workers=1)
    wanted = _train(world, **by_length)
    for direction in ("forward", "backward"):
        found = _train(world, strike=(1, STRUCK, direction, "middle", 2), options={"options": options}, **by_length)
        assert found[3] == (world.rank == 1)
        _assert_same(found, wanted, direction)


def check_all_ranks_at_once(world: World) -> None:
    wanted = _train(world)
    for direction, point in FEW:
        found = _train(world, strike=(world.rank, STRUCK, direction, point, 2))
        assert found[3] == 1
        _assert_same(found, wanted, (direction, point))


def check_the_comparison_can_fail(world: World) -> None:
    """What a failed backward has accumulated would be noticed, were it not dropped."""
    wanted = _train(world)
    with replaced(OpenWindow, "begin_again", OpenWindow.forget_micro_steps):
        found = _train(world, strike=(1, STRUCK, "backward", "middle", 1))
    with pytest.raises(AssertionError):
        _assert_same(found, wanted, "")


def check_the_scale_of_float16_stays(world: World) -> None:
    """Running out of memory is no overflow: the update is not skipped, and the scale neither falls nor grows late."""
    scales = []
    for strike in (None, (1, 2, "backward", "middle", 2)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        found = _train(world, strike=strike, scaler=scaler)
        assert not any(result.skipped for result in found[0])
        scales.append((scaler.get_scale(), scaler.state_dict()["_growth_tracker"]))
        assert found[3] == (strike is not None and world.rank == 1)
    assert scales[0] == scales[1] == (2.0**12, 0)


def check_no_collective_is_added(world: World) -> None:
    """As long as nothing happens, and for what a rank can do by itself; a window taken again syncs again."""
    counted = []
    for recovers, strike in (
        (False, None),
        (True, None),
        (True, (1, STRUCK, "forward", "end", 2)),
        (True, (1, STRUCK, "backward", "end", 1)),
        (True, (1, STRUCK, "backward", "end", 2)),
    ):
        with CollectiveCounter() as counter:
            _train(world, strike=strike, recovers=recovers, counts=True)
        counted.append(len(counter.collectives))
    assert len(set(counted[:4])) == 1, counted
    assert counted[4] > counted[0], "the counter must be able to notice"


def check_nan_of_the_data_stays_the_users_affair(world: World) -> None:
    def poison(module: Fragile) -> None:
        if world.rank == 1:
            module.out.register_forward_hook(lambda module, inputs, output: output * math.nan)

    with pytest.raises(UserError, match=r"update 1: the loss is nan \(rank 1, micro-steps 1, 2\)"):
        _train(world, prepare=poison)
