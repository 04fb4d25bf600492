"""Checks of the world and of what ranks agree on, on real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from examples import CollectiveCounter, flat
from rebinding import Rebinding
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distaccum import Accumulator, UpdateResult
from distaccum.errors import UserError
from distaccum.runtime.world import World
from distaccum.training.run import check_same_config


def check_values_travel_between_ranks(world: World) -> None:
    assert world.launched
    assert world.is_main == (world.rank == 0)
    assert world.gather({"rank": world.rank}) == [{"rank": rank} for rank in range(world.world_size)]
    assert world.from_main(f"from {world.rank}") == "from 0"


def check_together_passes_when_all_do(world: World) -> None:
    with world.together():
        done = True
    assert done


def check_an_error_on_one_rank_is_raised_on_all(world: World) -> None:
    def fail(condition: bool) -> None:
        if condition:
            raise UserError("no such file")

    for failing in range(world.world_size):
        with pytest.raises(UserError) as raised, world.together():
            fail(world.rank == failing)
        assert str(raised.value) == f"rank {failing}: no such file"


def check_an_error_that_all_ranks_have_is_said_once(world: World) -> None:
    with pytest.raises(UserError) as raised, world.together():
        raise UserError("no such file")
    assert str(raised.value) == "no such file"


def check_equal_configurations_pass(world: World) -> None:
    check_same_config(world, {"seed": 1, "model": {"sizes": [1, 2], "dropout": None}})


def check_different_configurations_are_refused_on_all_ranks(world: World) -> None:
    with pytest.raises(UserError) as raised:
        check_same_config(world, {"seed": 1, "model": {"sizes": [1, world.rank], "dropout": 0.5}})
    shown = ", ".join(f"[1, {rank}] on rank {rank}" for rank in range(world.world_size))
    assert str(raised.value) == (
        f"the ranks were started with different configurations: model.sizes is {shown}. Give all the same."
    )


def check_one_rank_is_the_first_to_fail(world: World) -> None:
    assert world.gather(world.is_first_to_fail()).count(True) == 1


def _update(
    model: nn.Module, accumulator: Accumulator, sums: dict[str, Tensor], weights: tuple[Any, ...] = (1, 1)
) -> UpdateResult:
    """One window, of a micro-step for each weight."""
    with accumulator.window(weights) as micro_batches:
        for weight in micro_batches:
            accumulator.backward(model(torch.ones(1, 2)).sum(), weight, sums)
    return accumulator.step()


def _placed(module: nn.Module, **options: Any) -> tuple[nn.Module, Accumulator]:
    model = DistributedDataParallel(module, **options)
    return model, Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1))


def check_sums_are_told_apart_by_their_names(world: World) -> None:
    """Whatever their order on each rank; and they may change, on all ranks alike."""
    model, accumulator = _placed(nn.Linear(2, 1))
    named = {"a": 1.0, "b": 10.0, "c": 100.0, "d": 1000.0}
    counts: list[int] = []
    mine = dict(sorted(named.items(), reverse=world.rank % 2 == 1))
    for names in ("abcd", "abcd", "", "bd", "abcd"):
        sums = {name: torch.full((2,), value) for name, value in mine.items() if name in names}
        with CollectiveCounter() as counter:
            found = _update(model, accumulator, sums).sums
        assert list(found) == list(sums)
        for name, value in found.items():
            assert value.tolist() == [2 * world.world_size * named[name]] * 2
        if names == "abcd":
            counts.append(len(counter.collectives))
    assert counts[1] < counts[0], "once the ranks have agreed, nothing is added"


def check_sums_that_differ_are_one_message_on_all_ranks(world: World) -> None:
    model, accumulator = _placed(nn.Linear(2, 1))
    common = {"a": torch.ones(()), "b": torch.ones(2)}
    last = world.rank == world.world_size - 1
    _update(model, accumulator, common)
    for other, said in (({"a": torch.ones(())}, r"a \[\]"), ({**common, "b": torch.ones(3)}, r"a \[\], b \[3\]")):
        with pytest.raises(UserError, match=rf"rank 0 has a \[\], b \[2\]; rank {world.world_size - 1} has {said}\."):
            _update(model, accumulator, other if last else common)
    said = rf"rank {world.world_size - 1}: sums\['a'\] came in 1 of 2 micro-steps"
    with accumulator.window((0, 1)) as micro_batches:
        for step in micro_batches:
            sums = {"b": torch.ones(2)} if last and step else common
            accumulator.backward(model(torch.ones(1, 2)).sum(), 1, sums)
    with pytest.raises(UserError, match=said):
        accumulator.step()
    assert _update(model, accumulator, common).sums["b"].tolist() == [2 * world.world_size] * 2


def check_a_rank_without_micro_batches_is_one_message_on_all_ranks(world: World) -> None:
    for module in (nn.Linear(2, 1), nn.Sequential(nn.Linear(2, 1), Rebinding(1))):
        for options in ({}, {"find_unused_parameters": True}):
            model, accumulator = _placed(module, **options)
            for weights in ((), (1,), (), (1, 1)):
                before = flat(model)
                if weights:
                    assert _update(model, accumulator, {"a": torch.ones(())}).weight == 2 * world.world_size
                    continue
                with pytest.raises(UserError, match="rank 1: the window has no micro-batch"):
                    _update(model, accumulator, {"a": torch.ones(())}, () if world.rank == 1 else (1, 1, 1))
                assert torch.equal(flat(model), before)


def check_a_negative_weight_on_one_rank_is_named_on_all(world: World) -> None:
    model, accumulator = _placed(nn.Linear(2, 1))
    weights = (torch.tensor(3), torch.tensor(-1 if world.rank == 1 else 1))
    with pytest.raises(UserError, match=r"a weight is negative, infinite or NaN \(rank 1, micro-step 2\)"):
        _update(model, accumulator, {}, weights)


def check_after_an_exception_in_the_last_backward_ranks_are_started_again(world: World) -> None:
    """Any other leaves the accumulator fit for the next window."""
    model, accumulator = _placed(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))
    for step, refused in ((1, False), (2, True)):
        steps = iter(range(1, 3))

        def fail(*_: Any, at: int = step, steps: Any = steps) -> None:
            if next(steps) == at:
                raise KeyError("in the backward")

        handle = model.module[0].weight.register_hook(fail)
        with pytest.raises(KeyError, match="in the backward"):
            _update(model, accumulator, {})
        handle.remove()
        if not refused:
            assert _update(model, accumulator, {}).weight == 2 * world.world_size
            continue
        for _ in range(2):
            with pytest.raises(UserError, match="Start all ranks again"):
                _update(model, accumulator, {})
