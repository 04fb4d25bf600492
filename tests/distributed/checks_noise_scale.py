"""Checks of the noise scale on real ranks: the same for every placement and cut, and the training stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from examples import flat
from torch import Tensor, nn

from distaccum import Accumulator, NoiseScale, UpdateResult, UserError, WindowLoader
from distaccum.config import DDPConfig, FSDPConfig, StrategyConfig
from distaccum.config.enums import Compression, PrecisionName
from distaccum.runtime.world import World
from distaccum.strategies import SingleStrategy, needs_equal_micro_steps, place

PLACEMENTS: dict[str, StrategyConfig] = {
    "ddp": DDPConfig(),
    "ddp, small buckets": DDPConfig(bucket_cap_mb=0.0001, gradient_as_bucket_view=False, find_unused_parameters=True),
    "ddp, static graph": DDPConfig(static_graph=True),
    "ddp, bf16": DDPConfig(compression=Compression.bf16),
    "zero-1": DDPConfig(shard_optimizer=True),
    "fsdp": FSDPConfig(),
    "fsdp, parameters kept": FSDPConfig(reshard_in_window=False),
}


class Distance(nn.Module):
    """½‖x − θ‖² in two blocks: a sample's gradient is θ − x, so all is known in closed form."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Part(dtype) for _ in range(2))

    def forward(self, inputs: Tensor) -> Tensor:
        left, right = inputs.chunk(2, dim=1)
        return self.parts[0](left) + self.parts[1](right)  # type: ignore[no-any-return]


class Part(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(6, dtype=dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        return 0.5 * (inputs - self.theta).square().sum(1)


POINTS = 0.4 + torch.randn(1002, 12, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
VARIANCE = float(POINTS.var(0).sum())
TRUE_SCALE = VARIANCE / (float(POINTS.mean(0).square().sum()) - VARIANCE / len(POINTS))
"""tr Σ / |G|² at θ = 0, of a population drawn from without replacement."""


def _run(
    config: StrategyConfig | None,
    *,
    noise: NoiseScale | None,
    world: World | None = None,
    updates: int = 32,
    lr: float = 0.0,
    dtype: torch.dtype = torch.float64,
    **batch: Any,
) -> tuple[list[UpdateResult], Tensor]:
    """32 updates: an epoch of 31 windows of 32, and a ragged one of 10."""
    module = Distance(dtype)
    strategy = SingleStrategy(module) if config is None else place(module, config, torch.device("cpu"))
    optimizer: torch.optim.Optimizer = torch.optim.SGD(strategy.model.parameters(), lr=lr, momentum=0.9)
    accumulator = Accumulator(strategy.model, optimizer, strategy=strategy, noise_scale=noise, clip_norm=1.0)
    here = {"rank": world.rank, "world_size": world.world_size} if world is not None else {"rank": 0, "world_size": 1}
    loader = WindowLoader(
        POINTS.to(dtype),  # type: ignore[arg-type]
        global_batch_size=32,
        equal_micro_steps=config is not None and needs_equal_micro_steps(config),
        **here,
        **batch,
    )
    results: list[UpdateResult] = []
    while len(results) < updates:
        for window in loader:
            with accumulator.window(window) as micro_batches:
                for micro_batch in micro_batches:
                    accumulator.backward(strategy.model(micro_batch).sum(), len(micro_batch))
            results.append(accumulator.step())
            if len(results) == updates:
                break
    return results, flat(strategy.module)


def check_every_placement_and_cut_measures_the_same(world: World) -> None:
    """One shot, accumulated, and these ranks: within their error bars, and near the truth."""
    runs: dict[str, tuple[StrategyConfig | None, dict[str, Any]]] = {
        "one shot": (None, {"accumulation_steps": 1, "split_every": 1}),
        "accumulated": (None, {"micro_batch_size": 5}),
        "ddp, K=1": (DDPConfig(), {"world": world, "accumulation_steps": 1}),
        **{name: (config, {"world": world, "micro_batch_size": 5}) for name, config in PLACEMENTS.items()},
    }
    found = {}
    for name, (config, options) in runs.items():
        noise = NoiseScale(every_updates=1, smoothing=0.999)
        results, _ = _run(config, noise=noise, **options)
        assert noise.measurements == 32, name
        assert all(-1 < (result.coherence or -2) < 1 for result in results), name
        assert abs(noise.scale - TRUE_SCALE) < 3 * noise.error < TRUE_SCALE, (name, noise.scale, noise.error)
        found[name] = noise
    truth = found["accumulated"]
    for name, noise in found.items():
        assert abs(noise.scale - truth.scale) < noise.error + truth.error, (name, noise.scale, truth.scale)
    # The same cut is the same measurement, however it is placed.
    values = [found[name].scale for name in PLACEMENTS if name != "ddp, bf16"]
    assert values == pytest.approx([values[0]] * len(values), rel=1e-9)
    assert found["ddp, bf16"].scale == pytest.approx(values[0], rel=1e-2)


def check_within_ten_percent_of_the_truth(world: World) -> None:
    for config in (DDPConfig(), FSDPConfig()):
        noise = NoiseScale(every_updates=1, smoothing=0.9999)
        _run(config, noise=noise, world=world, updates=96, micro_batch_size=8)
        assert noise.scale == pytest.approx(TRUE_SCALE, rel=0.1)


def check_no_bit_of_the_training_changes(world: World) -> None:
    for name, config in PLACEMENTS.items():
        if isinstance(config, DDPConfig) and config.shard_optimizer:
            continue  # the optimizer's own affair
        found = []
        for noise in (None, NoiseScale(every_updates=2)):
            results, parameters = _run(
                config, noise=noise, world=world, updates=7, lr=0.1, dtype=torch.float32, micro_batch_size=3
            )
            found.append(([(r.loss, r.grad_norm, r.sync_calls) for r in results], parameters))
        assert found[0][0] == found[1][0], name
        assert torch.equal(found[0][1], found[1][1]), name


def check_fsdp_measures_its_very_first_window(world: World) -> None:
    """As a resumed run must, and in bfloat16, whose gradients come in that format."""
    for precision, dtype in ((PrecisionName.fp32, torch.float32), (PrecisionName.bf16, torch.float32)):
        strategy = place(Distance(dtype), FSDPConfig(), torch.device("cpu"), precision)
        optimizer = torch.optim.SGD(strategy.model.parameters(), lr=0.1)
        accumulator = Accumulator(strategy.model, optimizer, strategy=strategy, noise_scale=NoiseScale(every_updates=1))
        mine = POINTS[world.rank * 8 :][:8].to(dtype).split(4)
        with accumulator.window(mine) as micro_batches:
            for batch in micro_batches:
                accumulator.backward(strategy.model(batch).sum(), len(batch), num_samples=len(batch))
        result = accumulator.step()
        parts = POINTS[: 8 * world.world_size].split(4)
        sums = torch.stack([part.sum(0) for part in parts])
        whole, pieces = float(sums.sum(0).square().sum()), float(sums.square().sum())
        wanted = (whole - pieces) / ((len(parts) - 1) * pieces)
        assert result.coherence == pytest.approx(wanted, rel=1e-5 if precision is PrecisionName.fp32 else 0.05)


def check_a_rank_without_samples_is_no_part(world: World) -> None:
    """Windows of fewer samples than ranks, whose others take a placeholder."""
    module = Distance(torch.float64)
    strategy = place(module, DDPConfig(), torch.device("cpu"))
    noise = NoiseScale(every_updates=1)
    accumulator = Accumulator(
        strategy.model, torch.optim.SGD(module.parameters(), lr=0.0), strategy=strategy, noise_scale=noise
    )
    size = 5 if world.world_size == 4 else 3  # 4 and 1 samples, or 2 and 1
    loader = WindowLoader(POINTS[:size], global_batch_size=size - 1, micro_batch_size=1)  # type: ignore[arg-type]
    coherences = []
    for window in loader:
        with accumulator.window(window) as micro_batches:
            for batch in micro_batches:
                accumulator.backward(strategy.model(batch).sum(), len(batch))
        coherences.append(accumulator.step().coherence)
    assert coherences[0] is not None
    assert coherences[1] is None, "one sample alone tells nothing"
    assert noise.measurements == 1


def check_powersgd_is_refused(world: World) -> None:
    strategy = place(Distance(torch.float32), DDPConfig(compression=Compression.powersgd), torch.device("cpu"))
    accumulator = Accumulator(
        strategy.model,
        torch.optim.SGD(strategy.model.parameters(), lr=0.1),
        strategy=strategy,
        noise_scale=NoiseScale(every_updates=1),
    )
    with pytest.raises(UserError, match="powersgd"), accumulator.window([POINTS[:2].float()] * 2):
        raise AssertionError("the window must not open")
