"""A small contrastive training in float64, for what is tested on ranks and in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from examples import flat, placed
from torch import Tensor, nn

from distaccum import Accumulator, TaskOutput, UpdateResult, WindowLoader, accumulate_coupled
from distaccum.config import StrategyConfig
from distaccum.config.optimizers import AdamConfig
from distaccum.strategies import needs_equal_micro_steps, shards_optimizer
from distaccum.tasks import Contrastive
from distaccum.training.optim import build_optimizer

FEATURES = 6


class Pairs(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Two noisy views of each of some points, and a label."""

    def __init__(self, num_samples: int = 41) -> None:
        generator = torch.Generator().manual_seed(3)
        points = torch.randn(num_samples, 1, FEATURES, generator=generator, dtype=torch.float64)
        self.views = points + 0.3 * torch.randn(num_samples, 2, FEATURES, generator=generator, dtype=torch.float64)
        self.labels = (points[:, 0, 0] > 0).long()

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.views[index], self.labels[index]


class Embedder(nn.Module):
    def __init__(self, *, dropout: float = 0.0, learn_temperature: bool = False) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.hidden = nn.Linear(FEATURES, 16)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(16, 4)
        self.log_scale = nn.Parameter(torch.tensor([1.0])) if learn_temperature else None
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        vectors = self.out(self.dropout(torch.tanh(self.hidden(inputs))))
        if self.log_scale is None:
            return vectors
        return nn.functional.normalize(vectors, dim=1) * (self.log_scale / 2).exp()


def train_pairs(
    config: StrategyConfig | None,
    *,
    updates: int = 6,
    rank: int = 0,
    world_size: int = 1,
    plain: bool = False,
    model: Callable[[], nn.Module] = Embedder,
    task: Any = None,
    data: torch.utils.data.Dataset[Any] | None = None,
    clip_norm: float | None = 0.5,
    seed: int = 1,
    **batch: Any,
) -> tuple[list[UpdateResult], Tensor]:
    """Trains over several epochs of ragged windows; returns the results and the parameters.

    Args:
        plain: accumulate as if the loss were a sum over micro-batches.
    """
    task = task or Contrastive(temperature=0.3)
    strategy = placed(model(), config)
    optimizer = build_optimizer(
        AdamConfig(_target_="torch.optim.AdamW", lr=1e-2, eps=1e-4),
        strategy.model.parameters(),
        torch.device("cpu"),
        shard=config is not None and shards_optimizer(config),
    )
    accumulator = Accumulator(strategy.model, optimizer, clip_norm=clip_norm, strategy=strategy)
    loader = WindowLoader(
        data or Pairs(),
        rank=rank,
        world_size=world_size,
        seed=seed,
        equal_micro_steps=config is not None and needs_equal_micro_steps(config),
        **{"global_batch_size": 16, **batch},
    )
    results: list[UpdateResult] = []
    while len(results) < updates:
        for window in loader:
            if plain:
                with accumulator.window(window) as micro_batches:
                    for batch_ in micro_batches:
                        output: TaskOutput = task(strategy.model, batch_)
                        accumulator.backward(output.loss_sum, output.weight, output.sums)
            else:
                accumulate_coupled(
                    accumulator,
                    window,
                    embed=lambda batch_: task.embed(strategy.model, batch_),
                    loss=task.window_loss,
                )
            results.append(accumulator.step())
            if len(results) == updates:
                break
    return results, flat(strategy.module)


def one_shot(**options: Any) -> tuple[list[UpdateResult], Tensor]:
    """Whole windows in one micro-batch each, by a plain backward: what is to be met."""
    return train_pairs(None, plain=True, micro_batch_size=options.get("global_batch_size", 16), **options)
