"""Compiled models on several ranks: the update of the model as it is, and few compilations."""

from __future__ import annotations

import pytest
import torch
from checks_unfreezing import Loop, assert_same, in_one_shot
from examples import RaggedTokens, curves, distance, train_tokens

from distaccum.config import DDPConfig, FSDPConfig, StrategyConfig
from distaccum.errors import UserError
from distaccum.runtime.compilation import Compilation
from distaccum.runtime.world import World
from distaccum.training.unfreezing import Unfreezing


def _compare(world: World, config: StrategyConfig) -> None:
    """Windows by length, with micro-steps that count nothing: nearly every micro-batch has a shape of its own."""
    here = {"rank": world.rank, "world_size": world.world_size}
    data = RaggedTokens(33)
    lengths = [len(inputs) for inputs, _ in data.samples]
    wanted, wanted_parameters = train_tokens(None, data=data, global_batch_size=16, micro_batch_size=16)
    torch._dynamo.utils.counters.clear()
    found, parameters = train_tokens(
        config,
        data=data,
        global_batch_size=16,
        micro_batch_size=3,
        lengths=lengths,
        compilation=Compilation("aot_eager", dynamic=True),
        **here,
    )
    for mine, reference in zip(curves(found), curves(wanted), strict=True):
        assert distance(mine, reference) < 1e-12
    assert distance(parameters, wanted_parameters) < 1e-12
    # Sizes of 1 have code of their own, in either dimension. All others share one.
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8


def check_ddp(world: World) -> None:
    _compare(world, DDPConfig())


def check_fsdp(world: World) -> None:
    _compare(world, FSDPConfig())


def check_parameters_are_unfrozen_on_the_way(world: World) -> None:
    wanted = in_one_shot("momentum", {"hidden": 2}, updates=3)
    for config in (DDPConfig(), FSDPConfig()):
        loop = Loop(world, config, "momentum", compilation=Compilation("aot_eager", dynamic=True))
        if isinstance(config, DDPConfig) and torch.__version__ < "2.13":
            with pytest.raises(UserError, match=r"compiled models under DDP need torch 2.13 for it"):
                Unfreezing(loop.strategy, loop.optimizer, {2: ["hidden.*"]})
            continue
        unfreezing = Unfreezing(loop.strategy, loop.optimizer, {2: ["hidden.*"]})
        assert_same(loop.train(unfreezing.go_to, updates=3), wanted, config)
