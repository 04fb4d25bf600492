"""Checks of losses that couple a window's samples, on real ranks. Float64, to 1e-12."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from coupled import FEATURES, Embedder, Pairs, one_shot, train_pairs
from examples import CollectiveCounter, curves, distance, flat, placed
from rebinding import Rebinding
from torch import Tensor, nn

from distaccum import (
    Accumulator,
    EvaluationLoader,
    TaskOutput,
    UserError,
    WindowLoader,
    accumulate_coupled,
    evaluate_model,
)
from distaccum.config import DDPConfig, FSDPConfig, StrategyConfig
from distaccum.runtime.world import World
from distaccum.tasks import Contrastive

PLACEMENTS: dict[str, StrategyConfig] = {
    "ddp": DDPConfig(),
    "ddp, small buckets": DDPConfig(find_unused_parameters=True, gradient_as_bucket_view=False, bucket_cap_mb=0.001),
    "ddp, static graph": DDPConfig(static_graph=True),
    "ddp + zero-1": DDPConfig(shard_optimizer=True),
    "fsdp": FSDPConfig(),
    "fsdp, parameters kept": FSDPConfig(reshard_in_window=False),
}


def _here(world: World) -> dict[str, int]:
    return {"rank": world.rank, "world_size": world.world_size}


def check_every_placement_makes_the_update_of_one_shot(world: World) -> None:
    """41 samples in windows of 16: the last one is ragged, with fewer micro-steps on one rank than on another."""
    wanted, wanted_parameters = one_shot()
    assert any(result.grad_norm > 0.5 for result in wanted), "clipping must act"
    for name, config in PLACEMENTS.items():
        is_plain = name in ("ddp", "fsdp")
        for batch in ({"micro_batch_size": 3}, {"micro_batch_size": 1}, {"accumulation_steps": 2})[
            : 3 if is_plain else 1
        ]:
            found, parameters = train_pairs(config, **batch, **_here(world))
            for mine, reference in zip(curves(found), curves(wanted), strict=True):
                assert distance(mine, reference) < 1e-12, (name, batch)
            assert distance(parameters, wanted_parameters) < 1e-12, (name, batch)
            assert [result.weight for result in found] == [result.weight for result in wanted]
            for key in ("retrieval", "neighbour_accuracy"):
                assert [r.sums[key] for r in found] == [r.sums[key] for r in wanted]


def check_ranks_with_nothing_to_do(world: World) -> None:
    """A window of one sample: all ranks but one have a placeholder."""
    options: dict[str, Any] = {"data": Pairs(33), "updates": 6}
    wanted, wanted_parameters = one_shot(**options)
    for config in (DDPConfig(), DDPConfig(find_unused_parameters=True), FSDPConfig()):
        found, parameters = train_pairs(config, micro_batch_size=3, **options, **_here(world))
        assert [result.weight for result in found] == [result.weight for result in wanted] == [32, 32, 2, 32, 32, 2]
        assert distance(parameters, wanted_parameters) < 1e-12, config


def check_plain_accumulation_misses(world: World) -> None:
    """The negative control: the loss of each micro-batch by itself has other, easier negatives."""
    wanted, wanted_parameters = one_shot()
    found, parameters = train_pairs(DDPConfig(), micro_batch_size=3, plain=True, **_here(world))
    assert distance(curves(found)[0], curves(wanted)[0]) > 1e-2
    assert distance(curves(found)[1], curves(wanted)[1]) > 1e-2
    assert distance(parameters, wanted_parameters) > 1e-2


def check_a_learned_temperature(world: World) -> None:
    options: dict[str, Any] = {
        "model": lambda: Embedder(learn_temperature=True),
        "task": Contrastive(temperature=None),
    }
    _, wanted = one_shot(**options)
    for config in (DDPConfig(), FSDPConfig()):
        _, parameters = train_pairs(config, micro_batch_size=2, **options, **_here(world))
        assert distance(parameters, wanted) < 1e-12, config


class _Waves(nn.Module):
    """Embeddings of which one is real and one is complex, with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.real, self.parts = nn.Linear(FEATURES, 3).double(), nn.Linear(FEATURES, 6).double()

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return self.real(inputs), torch.view_as_complex(self.parts(inputs).unflatten(1, (3, 2)))


def check_complex_embeddings_have_their_gradient(world: World) -> None:
    def loss(embeddings: tuple[Tensor, Tensor]) -> TaskOutput:
        real, waves = embeddings
        coupled = (waves @ waves.mH * (1 + 2j)).real + (real @ real.T)
        return TaskOutput(coupled.tanh().sum(), len(real))

    model, twin = placed(_Waves(), DDPConfig()), _Waves()
    accumulator = Accumulator(model.model, torch.optim.SGD(model.model.parameters(), lr=0.1), strategy=model)
    batches = [Pairs().views[start : start + 3, 0] for start in range(0, 6 * world.world_size, 3)]
    output = loss(twin(torch.cat(batches)))
    (output.loss_sum / output.weight).backward()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    accumulate_coupled(accumulator, batches[2 * world.rank :][:2], embed=model.model, loss=loss)
    assert distance(accumulator.step().loss, output.loss_sum.detach() / output.weight) < 1e-12
    assert distance(flat(model.module), flat(twin)) < 1e-12
    assert distance(flat(twin.parts), flat(_Waves().parts)) > 1e-2, "it has one"


def check_one_sync_per_update_whatever_the_steps(world: World) -> None:
    """And three more collectives for all embeddings: how many rows each rank has, views, labels."""

    def counted(steps: int, updates: int) -> tuple[int, int]:
        with CollectiveCounter() as counter:
            results, _ = train_pairs(DDPConfig(), accumulation_steps=steps, updates=updates, **_here(world))
        assert {result.sync_calls for result in results} == {1}
        assert {result.sync_bytes for result in results} == {flat(Embedder()).nbytes}
        gathers = [name for name, _ in counter.collectives if "allgather_base" in name]
        return len(gathers), len(counter.collectives)

    found = set()
    for steps in (1, 2, 4):
        (few, few_of_all), (many, many_of_all) = counted(steps, 1), counted(steps, 4)
        assert many - few == 3 * 3  # the first update may have more
        found.add(many_of_all - few_of_all)
    assert len(found) == 1


def check_dropout_is_replayed(world: World) -> None:
    """Against one graph of all micro-batches of all ranks, each embedded once with the random state it had."""
    model = Embedder(dropout=0.4)
    strategy = placed(model, DDPConfig())
    accumulator = Accumulator(strategy.model, torch.optim.SGD(model.parameters(), lr=0.1), strategy=strategy)
    task = Contrastive(temperature=0.3)
    loader = WindowLoader(Pairs(), global_batch_size=16, micro_batch_size=3, seed=1)
    torch.manual_seed(100 + world.rank)
    for number, window in enumerate(loader):
        held = list(window)
        twin = copy.deepcopy(model)
        everyone = world.gather((held, torch.get_rng_state()))
        rows = []
        with torch.random.fork_rng():
            states = []
            for batches, state in everyone:
                torch.set_rng_state(state)
                rows += [task.embed(twin, batch) for batch in batches]
                states.append(torch.get_rng_state())
        output = task.window_loss({key: torch.cat([row[key] for row in rows]) for key in rows[0]})
        (output.loss_sum / output.weight).backward()
        wanted = [parameter - 0.1 * parameter.grad for parameter in twin.parameters() if parameter.grad is not None]
        accumulate_coupled(
            accumulator, held, embed=lambda batch: task.embed(strategy.model, batch), loss=task.window_loss
        )
        update = accumulator.step()
        assert distance(update.loss, output.loss_sum.detach() / output.weight) < 1e-12, number
        assert distance(flat(model), torch.cat([w.detach().reshape(-1) for w in wanted])) < 1e-12, number
        assert torch.equal(torch.get_rng_state(), states[world.rank]), "as if each micro-batch had been embedded once"


class _NanOnce(Embedder):
    def __init__(self, bad: bool) -> None:
        super().__init__()
        self.bad, self.calls = bad, 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(inputs) * (float("nan") if self.bad and self.calls % 2 == 0 else 1.0)


def check_embeddings_that_are_nan_are_told_where_they_are(world: World) -> None:
    strategy = placed(_NanOnce(world.rank == 1), DDPConfig())
    accumulator = Accumulator(strategy.model, torch.optim.SGD(strategy.model.parameters(), lr=0.1), strategy=strategy)
    task = Contrastive(temperature=0.3)
    window = next(iter(WindowLoader(Pairs(), global_batch_size=16, accumulation_steps=2)))
    accumulate_coupled(
        accumulator, window, embed=lambda batch: task.embed(strategy.model, batch), loss=task.window_loss
    )
    with pytest.raises(UserError, match=re.escape("the loss is nan (rank 1, micro-step 2)")):
        accumulator.step()


def check_buffers_change_once_and_stay_the_same_on_all_ranks(world: World) -> None:
    """Rank 0's, as DDP has it: statistics after one pass over rank 0's micro-batches, also if tensors are replaced."""
    for statistics in (nn.BatchNorm1d, Rebinding):
        torch.manual_seed(2)
        model = nn.Sequential(statistics(FEATURES), nn.Linear(FEATURES, 4)).double()
        before = [buffer.clone() for buffer in model.buffers()]
        found, wanted = _buffers_of_both_ways(world, model)
        assert any(distance(now, then) > 1e-2 for now, then in zip(wanted, before, strict=True))
        for one, other in zip(found, wanted, strict=True):
            assert distance(one, other) < 1e-12, statistics


def _buffers_of_both_ways(world: World, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """A model's buffers after some coupled windows, and a copy's after rank 0's micro-batches, one by one."""
    task, data, twin = Contrastive(temperature=0.3), Pairs(), copy.deepcopy(model)
    strategy = placed(model, DDPConfig())
    accumulator = Accumulator(strategy.model, torch.optim.SGD(strategy.model.parameters(), lr=0.0), strategy=strategy)
    for window in WindowLoader(data, global_batch_size=16, micro_batch_size=3, seed=1):
        held = world.gather(list(window))[0]
        mine = [tuple(data[index] for index in indices) for indices in window.sample_indices]
        batches = [(torch.stack([s[0] for s in part]), torch.stack([s[1] for s in part])) for part in mine]
        for batch in held:
            task.embed(twin, batch)
        accumulate_coupled(
            accumulator, batches, embed=lambda batch: task.embed(strategy.model, batch), loss=task.window_loss
        )
        accumulator.step()
    strategy.share_buffers()
    return list(strategy.module.buffers()), list(twin.buffers())


def check_evaluations_are_the_same_for_any_ranks(world: World) -> None:
    model = Embedder()
    for samples, size in ((41, 16), (41, None), (world.world_size - 1, None)):
        task, data = Contrastive(temperature=0.3, evaluation_samples=size), Pairs(samples)
        loader = EvaluationLoader(data, batch_size=5)
        loss, weight, sums = evaluate_model(model, task, loader, device=torch.device("cpu"))
        blocks = [range(start, min(start + (size or samples), samples)) for start in range(0, samples, size or samples)]
        outputs = [task(model, (data.views[list(block)], data.labels[list(block)])) for block in blocks]
        assert weight == 2 * samples
        assert distance(loss, sum(output.loss_sum.detach() for output in outputs) / weight) < 1e-12 or samples == 1
        assert float(sums["retrieval"]) == sum(float(output.sums["retrieval"]) for output in outputs)
