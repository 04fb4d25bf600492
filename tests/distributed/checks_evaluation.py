"""Checks of evaluations, loaders and agreement between ranks, on real ranks."""

from __future__ import annotations

import logging
import math
import random
import time
from contextlib import closing
from typing import Any

import pytest
import torch
from examples import RaggedTokens, TokenClassifier, token_loss
from torch import nn
from torch.utils.data import Dataset

from distaccum import Accumulator, EvaluationLoader, TaskOutput, UserError, WindowLoader, evaluate_model
from distaccum.config import DDPConfig
from distaccum.loaders import LoaderOptions, waiting
from distaccum.runtime.world import World
from distaccum.strategies import place
from distaccum.training.data_waits import DataWaits


def _task(model: nn.Module, batch: Any) -> TaskOutput:
    loss_sum, weight = token_loss(model, batch)
    seen = torch.stack([torch.tensor(float(len(batch[0]))), weight.float()])
    return TaskOutput(loss_sum, weight, {"seen": seen, "loss": torch.tensor(1.0)})


def check_an_evaluation_is_exact_whatever_the_world_size(world: World) -> None:
    model = TokenClassifier()
    # 41: unequal shares; 3: not every rank of four has a sample.
    for num_samples, batch_size in ((41, 7), (3, 2), (41, 100)):
        data = RaggedTokens(num_samples)
        loss, weight, sums = evaluate_model(
            model, _task, EvaluationLoader(data, batch_size=batch_size), device=torch.device("cpu")
        )
        loss_sum, valid = token_loss(model, data.collate_fn(data.samples))
        assert weight == float(valid)
        assert math.isclose(loss, float(loss_sum.detach() / valid), rel_tol=1e-12)
        assert sums["seen"].tolist() == [num_samples, float(valid)]
        batches = sum(-(-share // batch_size) for share in _shares(num_samples, world.world_size))
        assert float(sums["loss"]) == batches
    assert model.training


def check_sums_that_differ_between_ranks_are_refused(world: World) -> None:
    """Instead of dropping what one of them has alone."""

    def task(module: nn.Module, batch: Any) -> TaskOutput:
        loss_sum, weight = token_loss(module, batch)
        return TaskOutput(loss_sum, weight, {"own" if world.rank else "other": torch.ones(2)})

    loader = EvaluationLoader(RaggedTokens(8), batch_size=2)
    with pytest.raises(UserError, match=r"sum/other.*sum/own"):
        evaluate_model(TokenClassifier(), task, loader, device=torch.device("cpu"))


def _shares(total: int, parts: int) -> list[int]:
    return [total // parts + (rank < total % parts) for rank in range(parts)]


def check_an_evaluation_has_no_gradients_and_comes_back_to_training(world: World) -> None:
    model = nn.Sequential(TokenClassifier(), nn.Dropout(0.5)).double()
    modes = []

    def task(module: nn.Module, batch: Any) -> TaskOutput:
        modes.append((module.training, torch.is_grad_enabled()))
        return _task(module, batch)

    evaluate_model(model, task, EvaluationLoader(RaggedTokens(8), batch_size=1), device=torch.device("cpu"))
    assert set(modes) == {(False, False)}
    assert model.training
    model[1].eval()
    evaluate_model(model, task, EvaluationLoader(RaggedTokens(8), batch_size=1), device=torch.device("cpu"))
    assert model.training
    assert not model[1].training, "what was frozen comes back frozen"
    model[1].train()
    with pytest.raises(UserError, match="total weight of 0"):
        evaluate_model(model, _task, [], device=torch.device("cpu"))
    assert model.training


def check_the_samples_loaded_are_the_same_for_every_world_size(world: World) -> None:
    """Recorded where the dataset is asked, with two workers and without."""

    class Recording(RaggedTokens):
        def __getitem__(self, index: int) -> Any:
            inputs, targets = super().__getitem__(index)
            return torch.cat([torch.tensor([index]), inputs]), torch.cat([torch.tensor([index]), targets])

    def loaded(**placement: Any) -> list[list[int]]:
        loader = WindowLoader(Recording(), global_batch_size=9, micro_batch_size=2, seed=4, **placement)
        return [
            [int(row[0]) for batch, size in zip(window, window.sizes, strict=True) if size for row in batch[0]]
            for window in loader.epoch(1)
        ]

    wanted = loaded(rank=0, world_size=1)
    ranks = world.gather(loaded())
    assert [[sample for rank in ranks for sample in rank[index]] for index in range(len(wanted))] == wanted
    assert sorted(sample for window in wanted for sample in window) == list(range(41))


def check_buffers_are_shared_before_an_evaluation(world: World) -> None:
    for broadcast in (True, False):
        module = nn.BatchNorm1d(3)
        strategy = place(module, DDPConfig(broadcast_buffers=broadcast), torch.device("cpu"))
        assert module.running_mean is not None
        module.running_mean.fill_(world.rank + 1.0)
        strategy.share_buffers()
        assert module.running_mean.tolist() == [1.0 if broadcast else world.rank + 1.0] * 3


def check_ranks_fail_together(world: World) -> None:
    def work(message: str | None) -> None:
        with world.together():
            if message:
                raise UserError(message)

    with pytest.raises(UserError, match=r"^rank 1: the disk is full$"):
        work("the disk is full" if world.rank == 1 else None)
    with pytest.raises(UserError, match=r"^all alike$"):
        work("all alike")
    work(None)


def check_ranks_agree(world: World) -> None:
    assert world.gather(world.rank) == list(range(world.world_size))
    assert world.from_main(f"from {world.rank}") == "from 0"


def check_only_one_rank_is_first_to_fail(world: World) -> None:
    assert sum(world.gather(world.is_first_to_fail())) == 1
    assert sum(world.gather(world.is_first_to_fail())) == 0


class _Slow(Dataset[Any]):
    """Sample i is i and a random number, and takes its time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return 24 * 16

    def __getitem__(self, index: int) -> tuple[int, float]:
        time.sleep(self.seconds)
        return index, random.random()


def check_workers_that_are_added_on_the_way_change_no_sample(world: World) -> None:
    def loaded(seconds: float, options: LoaderOptions) -> tuple[list[Any], int]:
        loader = WindowLoader(
            _Slow(seconds), global_batch_size=4 * world.world_size, micro_batch_size=1, options=options
        )
        found = []
        with closing(loader), pytest.MonkeyPatch.context() as patched:
            patched.setattr(waiting, "_TO_DECIDE", (2, 0.05))
            patched.setattr(waiting, "_MOST_WORKERS", 2)
            for window in loader.epoch(0):
                found.append([(int(index), float(drawn)) for index, drawn in window])
                if len(found) == 12:
                    break
            return found, loader.options.workers

    auto, workers = loaded(0.01, LoaderOptions(num_workers="auto", persistent_workers=True))
    assert workers == 2
    assert auto == loaded(0.0, LoaderOptions())[0]
    indices = [index for windows in world.gather(auto) for window in windows for index, _ in window]
    assert len(set(indices)) == 12 * 4 * world.world_size


def check_the_rank_that_waits_for_data_says_what_would_help(world: World) -> None:
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    is_slow = world.rank == world.world_size - 1
    model = nn.Linear(1, 1)
    strategy = place(model, DDPConfig(), torch.device("cpu"))
    loader = WindowLoader(_Slow(0.06 * is_slow), global_batch_size=2 * world.world_size, micro_batch_size=1)
    waits = DataWaits(loader)
    optimizer = torch.optim.SGD(strategy.module.parameters(), lr=0.1)
    accumulator = Accumulator(strategy.model, optimizer, strategy=strategy, reports=waits.reports)
    log = logging.getLogger("distaccum.training.data_waits")
    log.addHandler(handler)
    shares = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(waiting, "_TO_SAY", (2, 0.05))
        for window in loader.epoch(0):
            result = accumulator.run(
                window, lambda batch: TaskOutput(strategy.model(batch[1].float()[:, None]).sum(), len(batch[0]))
            )
            waits.after_update(result)
            shares.append(waits.share)
            if len(shares) == 12:
                break
    log.removeHandler(handler)
    assert shares[0] == 0
    assert shares[-1] > 0.5, "all ranks know of it"
    assert len(said) == is_slow, "once, on the rank that waits"
    if is_slow:
        assert "set data.num_workers=auto" in said[0]
