"""Checks of the world and of what ranks agree on, on real ranks."""

from __future__ import annotations

import pytest

from distaccum.assembly import check_same_config
from distaccum.distributed import World
from distaccum.errors import UserError


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
