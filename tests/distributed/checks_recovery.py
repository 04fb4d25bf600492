"""Checks of going on when memory runs out, on real ranks: each point of a window × each rank."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from examples import distance, flat
from injection import Fragile, Vectors, task

from distaccum import Accumulator, UpdateResult, WindowLoader
from distaccum.config import DDPConfig
from distaccum.distributed import World
from distaccum.recovery import Recovery
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
    **batch: Any,
) -> tuple[list[UpdateResult], torch.Tensor, list[int], int]:
    """Trains; with `strike` (rank, update, direction, point, micro-step), memory runs out there."""
    torch.manual_seed(3)
    module = Fragile(counts=counts).double()
    strategy = place_ddp(module, config or DDPConfig(bucket_cap_mb=0.0003), torch.device("cpu"))
    sizes: list[int] = []
    accumulator = Accumulator(
        strategy.model,
        (optimizer or (lambda p: torch.optim.AdamW(p, lr=3e-2)))(list(strategy.model.parameters())),
        clip_norm=1.0,
        strategy=strategy,
        recovery=Recovery(on_smaller=sizes.append),
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


def _strike_everywhere(world: World, steps: int, **options: Any) -> None:
    wanted = _train(world, **options)
    for rank, (direction, point), step in itertools.product(range(world.world_size), POINTS, range(1, steps + 1)):
        strike = (rank, STRUCK, direction, point, step)
        found = _train(world, strike=strike, **options)
        assert found[3] == (world.rank == rank), (strike, "memory has run out once, on that rank only")
        _assert_same(found, wanted, strike)
        assert found[2] == ([2] if world.rank == rank else []), (strike, found[2])


def check_every_point_of_a_window(world: World) -> None:
    _strike_everywhere(world, steps=2)


def check_every_point_of_a_window_of_one_micro_step(world: World) -> None:
    wanted = _train(world, micro_batch_size=8)
    for rank, update, (direction, point) in itertools.product(range(world.world_size), (1, 2), POINTS):
        strike = (rank, update, direction, point, 1)
        found = _train(world, strike=strike, micro_batch_size=8)
        assert found[3] == (world.rank == rank)
        _assert_same(found, wanted, strike)


def check_a_model_with_buffers(world: World) -> None:
    _strike_everywhere(world, steps=2, counts=True)
