from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distaccum import Accumulator, UpdateResult
from distaccum.config import FSDPConfig
from distaccum.config.enums import Accumulate, Offload
from distaccum.strategies import SingleStrategy, Strategy, place


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).double()


def _trained(strategy: Strategy) -> tuple[list[UpdateResult], list[Tensor]]:
    optimizer = torch.optim.AdamW(strategy.model.parameters(), lr=1e-2)
    accumulator = Accumulator(strategy.model, optimizer, clip_norm=0.5, strategy=strategy)
    torch.manual_seed(1)
    batches = [torch.randn(size, 16, dtype=torch.float64).cuda() for size in (3, 5, 2)]
    results = []
    for _ in range(4):
        with accumulator.window(batches) as micro_batches:
            for batch in micro_batches:
                accumulator.backward(strategy.model(batch).square().sum(), len(batch))
        results.append(accumulator.step())
    strategy.at_rest()
    whole = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in strategy.module.parameters())
    return results, [parameter.detach().cpu() for parameter in whole]


@pytest.mark.gpu
@pytest.mark.parametrize("accumulate", [Accumulate.whole, Accumulate.sharded])
def test_offloaded_parameters_make_the_same_update(tmp_path: Path, accumulate: Accumulate) -> None:
    wanted, parameters = _trained(SingleStrategy(_net().cuda()))
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=store, rank=0, world_size=1)
    try:
        config = FSDPConfig(accumulate=accumulate, offload=Offload.cpu)
        strategy = place(_net(), config, torch.device("cuda"))
        assert all(parameter.device.type == "cpu" for parameter in strategy.module.parameters())
        found, moved = _trained(strategy)
        assert all(parameter.device.type == "cpu" for parameter in strategy.module.parameters())
    finally:
        dist.destroy_process_group()
    for mine, other in zip(found, wanted, strict=True):
        assert mine.loss == pytest.approx(other.loss, rel=1e-12)
        assert mine.grad_norm == pytest.approx(other.grad_norm, rel=1e-12)
    for mine, other in zip(moved, parameters, strict=True):
        assert torch.allclose(mine, other, rtol=1e-11, atol=1e-13)
