"""`assert_same_update` over ranks: right loops pass, and others fail on all ranks, with the cause."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence

from distaccum.runtime.world import World
from distaccum.testing import UpdateDiffersError, assert_same_update

IGNORED = -100


def _sentences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(11, (2 + number * 5 % 7,), generator=generator) for number in range(17)]


def _model() -> nn.Module:
    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 11))


def _with_optimizer(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def _in_ddp() -> tuple[nn.Module, torch.optim.Optimizer]:
    return _with_optimizer(DistributedDataParallel(_model()))


def _in_fsdp() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = _model()
    fully_shard(model)
    return _with_optimizer(model)


def _total(micro_batches: list[Tensor]) -> Tensor:
    return torch.stack([(batch[:, 1:] != IGNORED).sum() for batch in micro_batches]).sum()


def _everywhere(micro_batches: list[Tensor]) -> Tensor:
    total = _total(micro_batches)
    dist.all_reduce(total)
    return total / dist.get_world_size()


def _loop(divisor: Callable[[list[Tensor]], Tensor], *, syncs: bool = True) -> Callable[..., None]:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: list[Any]) -> None:
        count = divisor(micro_batches)
        for number, batch in enumerate(micro_batches):
            is_last = number == len(micro_batches) - 1
            waits = isinstance(model, DistributedDataParallel) and not (is_last and syncs)
            with model.no_sync() if waits else nullcontext():  # type: ignore[operator]
                logits = model(batch[:, :-1].clamp_min(0)).flatten(0, 1)
                loss = F.cross_entropy(logits, batch[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
                (loss / count).backward()
        optimizer.step()

    return step


def _padded(samples: list[Tensor]) -> Tensor:
    return pad_sequence(samples, batch_first=True, padding_value=IGNORED)


def check_a_right_loop(world: World) -> None:
    for build in (_in_ddp, _in_fsdp):
        assert_same_update(build, _sentences(), _loop(_everywhere), collate=_padded, tolerance=1e-11)


def check_wrong_loops(world: World) -> None:
    half = 1 / world.world_size
    for step, cause in (
        (_loop(_total), "each rank divides by what it counts itself"),
        (_loop(_everywhere, syncs=False), "nothing was summed over the ranks"),
        (_loop(lambda batches: _everywhere(batches) * dist.get_world_size()), f"{half} times as large"),
    ):
        with pytest.raises(UpdateDiffersError, match=cause):
            assert_same_update(_in_ddp, _sentences(), step, collate=_padded)
    with pytest.raises(UpdateDiffersError, match="each rank divides by what it counts itself"):
        assert_same_update(_in_fsdp, _sentences(), _loop(_total), collate=_padded)
