"""The world of one process; tests/distributed has real ranks."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from distaccum.errors import OtherRankFailedError, UserError
from distaccum.runtime import world as distributed
from distaccum.runtime.world import World, joined_world


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


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of rank 1 of 2, who does not wait for long."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(distributed, "_SECONDS_TO_START", 1.0)
    return monkeypatch


@pytest.mark.usefixtures("second_of_two")
def test_when_nobody_is_there_one_rank_of_the_host_says_so() -> None:
    with pytest.raises(UserError, match=r"^the ranks can't find each other: .*\. Start them with torchrun\.$") as first:
        World()
    assert not isinstance(first.value, OtherRankFailedError)
    with pytest.raises(OtherRankFailedError):
        World()


def test_a_rank_that_does_not_start_is_named(second_of_two: pytest.MonkeyPatch) -> None:
    launcher = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    second_of_two.setenv("MASTER_PORT", str(launcher.port))
    second_of_two.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(UserError, match=r"^rank 0 did not start, or has ended: "), joined_world() as world:
        world.init_process_group(torch.device("cpu"))


@pytest.mark.parametrize("first", [0, 1])
def test_ranks_that_are_started_again_share_nothing_with_those_before(
    second_of_two: pytest.MonkeyPatch, first: int
) -> None:
    """Whichever of them comes first to the launcher's store."""
    launcher = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    second_of_two.setenv("MASTER_PORT", str(launcher.port))
    second_of_two.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    worlds = {}
    for rank in (0, 1):
        second_of_two.setenv("RANK", str(rank))
        worlds[rank] = World()
    for start in range(3):
        with ThreadPoolExecutor() as pool:
            one = pool.submit(worlds[first]._store_of_this_start)
            time.sleep(0.2)
            other = pool.submit(worlds[1 - first]._store_of_this_start)
            stores = one.result(), other.result()
        assert not stores[0].check(["address"])
        stores[0].set("address", str(start))
        assert stores[1].get("address") == str(start).encode()


def test_a_failure_before_the_ranks_have_met_is_reported_after_a_restart_too(second_of_two: pytest.MonkeyPatch) -> None:
    """By several torchruns, which don't count restarts alike, and whose store has what was said before."""
    launcher = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    second_of_two.setenv("MASTER_PORT", str(launcher.port))
    second_of_two.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    fails = "from distaccum.runtime.world import World; print(World().is_first_to_fail(), flush=True); input()"
    for _ in range(2):
        ranks = [
            subprocess.Popen([sys.executable, "-c", fails], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        said = [rank.stdout.readline().strip() for rank in ranks if rank.stdout is not None]
        for rank in ranks:
            rank.communicate("\n")
        assert sorted(said) == ["False", "True"]


def test_counters_and_wishes_are_shared(second_of_two: pytest.MonkeyPatch) -> None:
    launcher = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    second_of_two.setenv("MASTER_PORT", str(launcher.port))
    second_of_two.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    one, other = World(), World()
    assert (one.count("asked"), other.count("asked"), one.count("asked", 0)) == (1, 2, 2)
    assert one.first_wish("window/3", None) is None
    assert [one.first_wish("window/3", "drop"), other.first_wish("window/3", "finish")] == ["drop", "drop"]
    assert other.first_wish("window/3", None) == "drop"
