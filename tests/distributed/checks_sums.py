"""Checks of losses that are functions of sums over the window (Dice), on real ranks. Float64, to 1e-12."""

from __future__ import annotations

from typing import Any

import torch
from coupled import one_shot, train_pairs
from examples import curves, distance
from torch import Tensor, nn

from distaccum import EvaluationLoader, evaluate_model
from distaccum.config import DDPConfig, FSDPConfig, StrategyConfig
from distaccum.runtime.world import World
from distaccum.tasks import Dice

PLACEMENTS: dict[str, StrategyConfig] = {
    "ddp": DDPConfig(),
    "ddp + zero-1": DDPConfig(shard_optimizer=True),
    "fsdp": FSDPConfig(),
}


class Blobs(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Noisy images, and the class of each pixel: one is rare, and some images are mostly ignored."""

    def __init__(self, num_samples: int = 41) -> None:
        generator = torch.Generator().manual_seed(3)
        self.images = torch.randn(num_samples, 1, 4, 6, generator=generator, dtype=torch.float64)
        self.targets = (self.images[:, 0] > 0).long() + (self.images[:, 0] > 1.5).long()
        ignored = torch.rand(num_samples, 4, 6, generator=generator) < torch.linspace(0, 0.9, num_samples).view(
            -1, 1, 1
        )
        self.targets[ignored] = 255

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.targets[index]


def _network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 3, 1)).double()


OPTIONS: dict[str, Any] = {
    "model": _network,
    "task": Dice(cross_entropy=0.5),
    "data": Blobs(),
    "clip_norm": 0.05,
}


def _here(world: World) -> dict[str, int]:
    return {"rank": world.rank, "world_size": world.world_size}


def check_every_placement_makes_the_update_of_one_shot(world: World) -> None:
    """41 samples in windows of 16: the last one is ragged."""
    wanted, wanted_parameters = one_shot(**OPTIONS)
    assert any(result.grad_norm > 0.05 for result in wanted), "clipping must act"
    for name, config in PLACEMENTS.items():
        for batch in ({"micro_batch_size": 3}, {"micro_batch_size": 1})[: 2 if name == "ddp" else 1]:
            found, parameters = train_pairs(config, **batch, **OPTIONS, **_here(world))
            for mine, reference in zip(curves(found), curves(wanted), strict=True):
                assert distance(mine, reference) < 1e-12, (name, batch)
            assert distance(parameters, wanted_parameters) < 1e-12, (name, batch)
            assert [result.weight for result in found] == [result.weight for result in wanted]
            assert {result.sync_calls for result in found} == {1} or name == "fsdp"
            for result, reference in zip(found, wanted, strict=True):
                assert torch.equal(result.sums["intersections"], reference.sums["intersections"])
                assert distance(result.sums["claimed"], reference.sums["claimed"]) < 1e-12


def check_the_mean_of_micro_batches_misses(world: World) -> None:
    """The negative control: each micro-batch's own Dice, averaged by samples."""
    wanted, wanted_parameters = one_shot(**OPTIONS)
    found, parameters = train_pairs(DDPConfig(), micro_batch_size=3, plain=True, **OPTIONS, **_here(world))
    for mine, reference in zip(curves(found), curves(wanted), strict=True):
        assert distance(mine, reference) > 1e-3
    assert distance(parameters, wanted_parameters) > 1e-2


def check_evaluations_are_of_all_samples(world: World) -> None:
    model, task = _network(), OPTIONS["task"]
    for samples in (41, world.world_size - 1):  # a rank without a sample
        data = Blobs(samples)
        loss, weight, sums = evaluate_model(
            model, task, EvaluationLoader(data, batch_size=5), device=torch.device("cpu")
        )
        wanted = task(model, (data.images, data.targets))
        assert weight == samples
        assert distance(loss, wanted.loss_sum.detach() / samples) < 1e-12
        metrics = [task.metrics({k: v.double() for k, v in s.items()}, samples) for s in (sums, wanted.sums)]
        assert metrics[0] == metrics[1]
