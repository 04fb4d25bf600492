"""The world of one process; tests/distributed has real ranks."""

from __future__ import annotations

import pytest
import torch

from distaccum.distributed import World, joined_world
from distaccum.errors import UserError


def test_without_a_launcher_there_is_one_rank() -> None:
    with joined_world() as world:
        assert (world.rank, world.local_rank, world.world_size) == (0, 0, 1)
        assert world.is_main
        assert not world.launched
        world.init_process_group(torch.device("cpu"))
        assert world.gather("mine") == ["mine"]
        assert world.from_main("mine") == "mine"


def test_a_world_size_without_a_rank_is_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with joined_world() as world:
        assert world.world_size == 1
        assert world.gather("mine") == ["mine"]


def test_ranks_that_cannot_find_each_other_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^the ranks can't find each other: .*MASTER_ADDR.*\. Start them with torchr"):
        World()


@pytest.mark.parametrize("error", [UserError("mend this"), ValueError("a bug"), KeyboardInterrupt()])
def test_errors_of_a_lone_rank_pass_through(error: BaseException) -> None:
    with pytest.raises(type(error)) as found, joined_world():
        raise error
    assert found.value is error


@pytest.mark.parametrize("error", [UserError("mend this"), ValueError("a bug")])
def test_together_passes_on_the_errors_of_a_lone_rank(error: Exception) -> None:
    with joined_world() as world, pytest.raises(type(error)) as found, world.together():
        raise error
    assert str(found.value) == str(error)
