"""Several losses, each with its own denominator, on real ranks: any placement against one shot in plain torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks_matrix import ONE_PROCESS, PLACEMENTS
from examples import VOCABULARY, CollectiveCounter, RaggedTokens, distance, flat, placed
from torch import Tensor, nn

from distaccum import (
    Accumulator,
    EvaluationLoader,
    LossTerm,
    Recovery,
    TaskOutput,
    UpdateResult,
    UserError,
    WindowLoader,
)
from distaccum.config import DDPConfig, StrategyConfig
from distaccum.config.optimizers import AdamConfig
from distaccum.runtime.world import World
from distaccum.strategies import SingleStrategy, needs_equal_micro_steps, shards_optimizer
from distaccum.training.evaluation import evaluated, evaluation_metrics
from distaccum.training.optim import build_optimizer

COEFFICIENTS = {"sequence": 0.3, "rare": 2.0, "never": 5.0}
_ADAMW = AdamConfig(_target_="torch.optim.AdamW", lr=3e-2, weight_decay=0.01)
UPDATES = 6
Wanted = tuple[list[float], list[dict[str, float]], Tensor]
"""Losses, the means of the terms, and the parameters in the end."""


class ThreeHeads(nn.Module):
    """Logits of the next token, and two numbers of each sequence."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.out = nn.Linear(8, VOCABULARY)
        self.heads = nn.Linear(8, 3)
        self.double()

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.embedding(tokens))
        return self.out(hidden), self.heads(hidden[:, 0])


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, tuple[Tensor, Tensor | int]]:
    """Sum and number of elements of each loss in a micro-batch. `rare` is of few sequences, `never` of none."""
    inputs, targets = batch
    logits, scores = model(inputs)
    is_rare = inputs[:, 0] == 3
    return {
        "main": (
            F.cross_entropy(logits.transpose(1, 2), targets, reduction="sum"),
            (targets != -100).sum(),
        ),
        "sequence": ((scores[:, 0] - inputs[:, 0]).square().sum(), len(inputs)),
        "rare": ((scores[:, 1] - 1).square()[is_rare].sum(), is_rare.sum()),
        "never": (scores[:, 2][inputs[:, 0] < 0].sum(), 0),
    }


def weights(batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor | float]:
    inputs, targets = batch
    rare = (inputs[:, 0] == 3).sum()
    return {"never": 0, "rare": rare, "main": (targets != -100).sum(), "sequence": len(inputs)}


def one_shot(data: RaggedTokens, updates: int, global_batch_size: int) -> Wanted:
    """Trains in plain torch, without the accumulator."""
    model = ThreeHeads()
    optimizer = build_optimizer(_ADAMW, model.parameters(), torch.device("cpu"))
    loader = WindowLoader(
        data, global_batch_size=global_batch_size, micro_batch_size=global_batch_size, seed=1, rank=0, world_size=1
    )
    found, means_found = [], []
    while len(found) < updates:
        for window in loader:
            (batch,) = window
            parts = losses(model, batch)
            means = {name: loss_sum / int(weight) for name, (loss_sum, weight) in parts.items() if int(weight)}
            loss = torch.stack([COEFFICIENTS.get(name, 1.0) * mean for name, mean in means.items()]).sum()
            optimizer.zero_grad()
            loss.backward()
            for parameter in model.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            found.append(float(loss.detach()))
            means_found.append({name: float(means[name].detach()) if name in means else 0.0 for name in parts})
            if len(found) == updates:
                break
    return found, means_found, flat(model)


def train(
    world: World | None,
    config: StrategyConfig | None,
    *,
    data: RaggedTokens,
    updates: int = UPDATES,
    in_one_call: bool = False,
    means_of_means: bool = False,
    model: nn.Module | None = None,
    recovery: Recovery | None = None,
    **batch: Any,
) -> tuple[list[UpdateResult], Tensor]:
    strategy = placed(model or ThreeHeads(), config) if config is not None else SingleStrategy(model or ThreeHeads())
    optimizer = build_optimizer(
        _ADAMW,
        strategy.model.parameters(),
        torch.device("cpu"),
        shard=config is not None and shards_optimizer(config),
    )
    accumulator = Accumulator(
        strategy.model,
        optimizer,
        strategy=strategy,
        weights=None if means_of_means else weights,
        recovery=recovery,
    )
    here = {"rank": 0, "world_size": 1} if world is None else {"rank": world.rank, "world_size": world.world_size}
    loader = WindowLoader(
        data,
        seed=1,
        equal_micro_steps=config is not None and needs_equal_micro_steps(config),
        **here,
        **{"global_batch_size": 16, "micro_batch_size": 3, **batch},
    )

    def forward(micro_batch: Any) -> TaskOutput:
        parts = losses(strategy.model, micro_batch)
        main, count = parts.pop("main")
        if means_of_means:
            means = [COEFFICIENTS[name] * s / max(1, int(w)) for name, (s, w) in parts.items()]
            return TaskOutput(main / max(1, int(count)) + torch.stack(means).sum(), 1.0)
        terms = {name: LossTerm(s, w, COEFFICIENTS[name]) for name, (s, w) in parts.items()}
        return TaskOutput(main, count, terms=terms)

    results: list[UpdateResult] = []
    while len(results) < updates:
        for window in loader:
            if in_one_call:
                results.append(accumulator.run(window, forward))
            else:
                with accumulator.window(window) as micro_batches:
                    for micro_batch in micro_batches:
                        output = forward(micro_batch)
                        accumulator.backward(output.loss_sum, output.weight, terms=output.terms)
                results.append(accumulator.step())
            if len(results) == updates:
                break
    return results, flat(strategy.module)


def _compare(found: tuple[list[UpdateResult], Tensor], wanted: Wanted, what: Any) -> None:
    (results, parameters), (loss, means, wanted_parameters) = found, wanted
    assert distance([result.loss for result in results], loss) < 1e-12, what
    assert distance(parameters, wanted_parameters) < 1e-12, what
    for result, mean in zip(results, means, strict=True):
        assert result.terms.keys() == mean.keys()
        assert distance(list(result.terms.values()), [mean[name] for name in result.terms]) < 1e-12, what
        assert result.terms["never"] == 0


def check_any_placement_is_one_shot(world: World) -> None:
    """Ragged windows, unequal lengths, a term that few samples have and one that none has."""
    placements: dict[str, StrategyConfig | None] = {**PLACEMENTS}
    if world.world_size == 1:
        placements |= ONE_PROCESS
    for data, size in ((RaggedTokens(), 16), (RaggedTokens(33), 16)):  # the last window of 33 is a single sample
        wanted = one_shot(data, UPDATES, size)
        assert any(means["rare"] == 0 for _, means in zip(*wanted[:2], strict=True)) or size == 16
        for name, config in placements.items():
            _compare(train(world, config, data=data, in_one_call=True), wanted, name)
    lengths = [len(inputs) for inputs, _ in RaggedTokens().samples]
    wanted = one_shot(RaggedTokens(), UPDATES, 5)
    assert any(means["rare"] == 0 for means in wanted[1]), "a window in which no rank has the term"
    for name in ("ddp", "fsdp"):
        found = train(world, PLACEMENTS[name], data=RaggedTokens(), global_batch_size=5, lengths=lengths)
        _compare(found, wanted, f"{name}, by length")


def check_evaluations_have_each_loss(world: World) -> None:
    """With a term that only some batches give, and ranks without a batch."""

    def task(model: nn.Module, batch: Any) -> TaskOutput:
        parts = losses(model, batch)
        main, count = parts.pop("main")
        terms = {
            name: LossTerm(s, w, COEFFICIENTS[name]) for name, (s, w) in parts.items() if name == "never" or int(w)
        }
        return TaskOutput(main, count, terms=terms)

    for num_samples in (41, 3):
        data = RaggedTokens(num_samples)
        model = ThreeHeads()
        found = evaluated(model, task, EvaluationLoader(data, batch_size=1), device=torch.device("cpu"))
        parts = losses(model, data.collate_fn(data.samples))
        means = {name: float(s.detach()) / int(w) if int(w) else 0.0 for name, (s, w) in parts.items()}
        assert all(math.isclose(found.terms[name], means[name], rel_tol=1e-12) for name in found.terms)
        assert means.keys() - found.terms.keys() <= {"rare"}, "nobody has given it"
        loss = sum(COEFFICIENTS.get(name, 1.0) * mean for name, mean in means.items())
        assert math.isclose(found.loss, loss, rel_tol=1e-12)
        metrics = evaluation_metrics(task, found)
        assert (metrics["loss"], metrics["loss/main"]) == (found.loss, found.terms["main"])


def check_means_of_means_miss(world: World) -> None:
    """The negative control: each micro-batch divided by its own weights."""
    _, _, wanted = one_shot(RaggedTokens(), UPDATES, 16)
    _, found = train(world, DDPConfig(), data=RaggedTokens(), means_of_means=True)
    assert distance(found, wanted) > 1e-3


def check_one_more_small_collective_whatever_the_steps(world: World) -> None:
    if world.world_size == 1:
        return
    counts, syncs = set(), set()
    for steps in (1, 2, 8):
        options: dict[str, Any] = {
            "data": RaggedTokens(32, length=6), "global_batch_size": 32, "micro_batch_size": None,
            "accumulation_steps": steps,
        }  # fmt: skip
        found = []
        for means in (False, True):
            with CollectiveCounter() as counter:
                results, _ = train(world, DDPConfig(), means_of_means=means, updates=4, **options)
            found.append((counter.collectives, counter.host_syncs, results[-1].sync_calls))
        (several, waits, calls), (one, _, calls_of_one) = found
        assert calls == calls_of_one
        more = list(several)
        for entry in one:
            more.remove(entry) if entry in more else None
        small = [entry for entry in more if entry == ("c10d::allreduce_", 8 * 4)]
        assert len(small) == 4, more  # one for each update
        counts.add(len(more))
        syncs.add(waits)
    assert len(counts) == 1, "whatever the steps"


def check_names_that_differ_are_refused_on_all_ranks(world: World) -> None:
    if world.world_size == 1:
        return
    strategy = placed(ThreeHeads(), DDPConfig())
    batch = RaggedTokens.collate_fn(RaggedTokens().samples[:3])
    optimizer = torch.optim.SGD(strategy.model.parameters(), lr=0.1)
    accumulator = Accumulator(
        strategy.model, optimizer, strategy=strategy, weights=lambda batch: {"main": 1, f"of {world.rank % 2}": 1}
    )
    said = r"losses differ: weights\(\) has counted main, of 0 on one and main, of 1"
    with pytest.raises(UserError, match=said), accumulator.window([batch]):
        pass
    # What is wrong on one rank alone is said on all.
    broken = Accumulator(
        strategy.model,
        optimizer,
        strategy=strategy,
        weights=lambda batch: {"main": 1 if world.rank != 1 else -1.0},
    )
    before = flat(strategy.module)
    with pytest.raises(UserError, match="counted a weight that is negative"):
        broken.run([batch], lambda batch: TaskOutput(sum(s for s, _ in losses(strategy.model, batch).values()), 1))
    assert torch.equal(flat(strategy.module), before)


class _Hungry(torch.autograd.Function):
    left = 0

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        _Hungry.left -= 1
        if _Hungry.left == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gradients[0]


class HungryHeads(ThreeHeads):
    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits, scores = super().forward(tokens)
        return _Hungry.apply(logits), scores  # type: ignore[no-untyped-call]


def check_micro_steps_taken_again(world: World) -> None:
    """Memory runs out on the last rank, in each of its backwards once: denominators are not counted again."""
    wanted = one_shot(RaggedTokens(), 3, 16)
    for backward in (1, 2, math.ceil(16 / world.world_size / 3)):
        _Hungry.left = backward if world.rank == world.world_size - 1 else 0
        found = train(
            world,
            DDPConfig(find_unused_parameters=True),
            data=RaggedTokens(),
            updates=3,
            in_one_call=True,
            model=HungryHeads(),
            recovery=Recovery(),
        )
        assert _Hungry.left < 0
        _compare(found, wanted, backward)
