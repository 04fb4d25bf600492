"""Augmented and mixed images, class weights and smoothed labels: any placement against one shot in plain torch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checks_matrix import PLACEMENTS
from examples import distance, flat, placed
from PIL import Image
from torch import Tensor

from distaccum import Accumulator, TaskOutput, WindowLoader
from distaccum.config import DDPConfig, StrategyConfig
from distaccum.config.optimizers import AdamConfig
from distaccum.data import Augment, ImageFolder, Mixing
from distaccum.loaders import LoaderOptions
from distaccum.models import CNN
from distaccum.runtime.world import World
from distaccum.strategies import needs_equal_micro_steps, shards_optimizer
from distaccum.tasks import Classification
from distaccum.training.optim import build_optimizer

_ADAMW = AdamConfig(_target_="torch.optim.AdamW", lr=1e-2, weight_decay=0.01)
SMOOTHING, CLASS_WEIGHTS = 0.1, [0.2, 1.0, 7.0]
UPDATES = 5
"""Of windows of 6 from 19 images: an epoch, whose last window is a single image, and the next one's first."""


@contextmanager
def images() -> Iterator[ImageFolder]:
    with tempfile.TemporaryDirectory() as root:
        generator = np.random.default_rng(0)
        for number in range(19):
            folder = Path(root, f"class_{number % 3}")
            folder.mkdir(exist_ok=True)
            pixels = generator.integers(0, 255, (12, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
        yield ImageFolder(
            "train",
            root,
            evaluation_fraction=0,
            image_size=8,
            augment=Augment([0.3, 1.0], flip=0.5, colour=0.3),
            mixing=Mixing(mixup=0.4, cutmix=1.0, probability=0.8),
        )


def network() -> CNN:
    torch.manual_seed(2)
    return CNN(input_shape=(3, 8, 8), num_classes=3, channels=[8]).double()


def windows(data: ImageFolder, **cut: Any) -> Iterator[Any]:
    loader = WindowLoader(
        data,
        global_batch_size=6,
        seed=1,
        options=LoaderOptions(device=torch.device("cpu"), float_dtype=torch.float64),
        **cut,
    )
    count = 0
    while True:
        for window in loader:
            yield window
            if (count := count + 1) == UPDATES:
                return


def one_shot(data: ImageFolder) -> tuple[list[float], Tensor]:
    """Trains in plain torch, without the accumulator and without the task."""
    model = network()
    optimizer = build_optimizer(_ADAMW, model.parameters(), torch.device("cpu"))
    weights, found = torch.tensor(CLASS_WEIGHTS, dtype=torch.float64), []
    for (batch,) in windows(data, micro_batch_size=6, rank=0, world_size=1):
        inputs, targets = batch
        smoothed = (1 - SMOOTHING) * targets + SMOOTHING / 3
        loss = -(smoothed * weights * model(inputs).log_softmax(-1)).sum() / (targets * weights).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found, flat(model)


def train(
    world: World, config: StrategyConfig | None, data: ImageFolder, *, per_micro_batch: bool = False
) -> tuple[list[float], Tensor]:
    strategy = placed(network(), config)
    optimizer = build_optimizer(
        _ADAMW,
        strategy.model.parameters(),
        torch.device("cpu"),
        shard=config is not None and shards_optimizer(config),
    )
    accumulator = Accumulator(strategy.model, optimizer, strategy=strategy)
    task = Classification(SMOOTHING, CLASS_WEIGHTS)

    def forward(batch: Any) -> TaskOutput:
        output = task(strategy.model, batch)
        return TaskOutput(output.loss_sum / output.weight, 1.0) if per_micro_batch else output

    cut = {
        "micro_batch_size": 2,
        "equal_micro_steps": config is not None and needs_equal_micro_steps(config),
        "rank": world.rank if config is not None else 0,
        "world_size": world.world_size if config is not None else 1,
    }
    results = [accumulator.run(window, forward) for window in windows(data, **cut)]
    return [result.loss for result in results], flat(strategy.module)


def check_any_placement_is_one_shot(world: World) -> None:
    names = ("ddp", "ddp + zero-1", "fsdp") if world.world_size == 2 else ("ddp",)
    placements: dict[str, StrategyConfig | None] = {"accumulated": None, **{name: PLACEMENTS[name] for name in names}}
    with images() as data:
        losses, wanted = one_shot(data)
        for name, config in placements.items():
            found, parameters = train(world, config, data)
            assert distance(found, losses) < 1e-12, name
            assert distance(parameters, wanted) < 1e-12, name


def check_denominators_of_micro_batches_miss(world: World) -> None:
    """The negative control: torch's CrossEntropyLoss(weight=…) on each micro-batch, averaged."""
    with images() as data:
        losses, wanted = one_shot(data)
        found, parameters = train(world, DDPConfig(), data, per_micro_batch=True)
        assert distance(found, losses) > 1e-2
        assert distance(parameters, wanted) > 1e-3
