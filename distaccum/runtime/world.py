"""The ranks of a run: they join, exchange objects, fail together, and report the cause once."""

from __future__ import annotations

import gc
import ipaddress
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from distaccum.config.launcher import launch
from distaccum.errors import EXIT_STATUS, OtherRankFailedError, UserError, asked_to_exit
from distaccum.runtime.diagnosis import is_broken_collective
from distaccum.runtime.heartbeat import Heartbeat, answer
from distaccum.runtime.logs import print_error
from distaccum.runtime.nested import gather_objects
from distaccum.runtime.processes import signal_when_parent_ends

T = TypeVar("T")

_FAILURES = "failures"
_HEARD = "heard"
_SECONDS_TO_START = 300.0
"""How long ranks wait for each other's start, which takes as long as the slowest disk needs to load libraries."""
_SECONDS_BETWEEN_ANSWERS = 0.02
_NCCL_PATIENCE = 60.0
"""How much longer NCCL's own watchdog waits, which aborts the process with a page of C++."""


class World:
    """All ranks of this run, seen from one of them. Made by `joined_world`.

    Attributes:
        rank, local_rank, world_size: as in torch.distributed; 0, 0 and 1 without a launcher.
        ranks_on_host: how many of them this host has.
        launched: True under torchrun, or any launcher that sets the same environment.
        heartbeat: publishes what this rank is doing.

    Raises:
        UserError: the launcher's environment lacks what the ranks need to find each other, or is contradictory.
    """

    def __init__(self) -> None:
        found = launch()
        self.launched, self.rank, self.local_rank = found.is_launched, found.rank, found.local_rank
        self.world_size, self.ranks_on_host = found.world_size, found.local_world_size
        self._store: Any = None  # a torch.distributed.Store
        self._speaks_for_host = False
        if self.launched:
            self._store = PrefixStore(_attempt(), self._find_store())
            _end_with_launcher()
        self._shared = self._store  # for the ranks' own entries, besides torch's
        self.heartbeat = Heartbeat(self.rank, self.world_size)

    def _find_store(self) -> Any:
        try:
            patience = timedelta(seconds=_SECONDS_TO_START)
            return next(rendezvous("env://", self.rank, self.world_size, timeout=patience))[0]
        except (ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not self._is_first_on_this_host():
                raise OtherRankFailedError("stopped because the ranks can't find each other") from error
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(f"the ranks can't find each other: {reason}. Start them with torchrun.") from error

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def init_process_group(self, device: torch.device, timeout_seconds: float = 600.0) -> None:
        """Connects the ranks: NCCL between GPUs, gloo between CPUs. Nothing to do without a launcher.

        Args:
            timeout_seconds: how long a rank waits for another one in a collective.

        Raises:
            UserError: a rank has not come, or can't be reached.
        """
        if self._store is None:
            return
        store = self._shared = self._store_of_this_start()
        on_cuda = device.type == "cuda"
        try:
            dist.init_process_group(
                "nccl" if on_cuda else "gloo",
                store=store,
                rank=self.rank,
                world_size=self.world_size,
                timeout=timedelta(seconds=timeout_seconds + (_NCCL_PATIENCE if on_cuda else 0.0)),
                device_id=device if on_cuda else None,
            )
        except RuntimeError as error:
            raise UserError(_explain_connecting(error)) from error
        if self.world_size > 1:
            self._shared = self._own_store()
            on_stuck = self._end_stuck if on_cuda else None
            self.heartbeat.start(self._shared, timeout_seconds, is_said_here=_is_said_here, on_stuck=on_stuck)

    def _own_store(self) -> Any:
        """A store on rank 0: the launcher's ends with the launcher, and has what ranks wrote before a restart."""
        patience = timedelta(seconds=_SECONDS_TO_START)
        store = dist.TCPStore(_own_address(), 0, None, True, patience, False) if self.is_main else None  # type: ignore[attr-defined]
        host, port = self.from_main((store.host, store.port) if store is not None else ("", 0))
        return dist.TCPStore(host, port, None, False, patience) if store is None else store  # type: ignore[attr-defined]

    def _store_of_this_start(self) -> Any:
        """Returns what all ranks share, and no rank before them, once all have come.

        torchrun hands ranks that it starts again its store as the dead ones have left it, where torch would find those
        ones' addresses. So rank 0 answers to a word of each that only a living one can have said.
        """
        word = secrets.token_hex(8)
        try:
            self._store.set(f"word/{self.rank}", word)
            if self.is_main:
                return self._all_welcomed(word)
            store = PrefixStore(bytes(self._store.get(f"answer/{word}")).decode(), self._store)
        except RuntimeError as error:
            # Rank 0 held the store, or is beside the launcher that did.
            raise UserError(_explain_missing([0])) from error
        keys = self._starts()
        try:
            store.set(keys[self.rank], "")
            store.wait(keys, timedelta(seconds=_SECONDS_TO_START))
        except RuntimeError as error:
            if missing := self._missing(store):
                raise UserError(_explain_missing(missing)) from error
        return store

    def _all_welcomed(self, word: str) -> Any:
        """Answers all ranks with rank 0's word until all have heard it."""
        store = PrefixStore(word, self._store)
        store.set(self._starts()[0], "")
        deadline = time.monotonic() + _SECONDS_TO_START
        while missing := self._missing(store):
            if time.monotonic() > deadline:
                raise UserError(_explain_missing(missing))
            for rank in missing:
                if self._store.check([f"word/{rank}"]):
                    self._store.set(f"answer/{bytes(self._store.get(f'word/{rank}')).decode()}", word)
            time.sleep(_SECONDS_BETWEEN_ANSWERS)
        return store

    def _starts(self) -> list[str]:
        return [f"started/{rank}" for rank in range(self.world_size)]

    def _missing(self, store: Any) -> list[int]:
        try:
            return [rank for rank, key in enumerate(self._starts()) if not store.check([key])]
        except RuntimeError:
            return [0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks, on every rank. Values must be picklable."""
        if self.world_size == 1:
            return [value]
        with self.heartbeat.waiting_in("exchange between the ranks"):
            return gather_objects(value, dist.group.WORLD)

    def from_main(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        return self.gather(value)[0]

    def count(self, name: str, number: int = 1) -> int:
        """Adds to a counter that all ranks share; returns its value. Waits for no rank."""
        assert self._shared is not None
        return int(self._shared.add(f"count/{name}", number))

    def first_wish(self, name: str, wish: str | None) -> str | None:
        """Returns the ranks' first wish under a name, this one included; None if there is none. Waits for no rank."""
        assert self._shared is not None
        key = f"wish/{name}"
        if wish is not None:
            return bytes(self._shared.compare_set(key, "", wish)).decode()
        return bytes(self._shared.get(key)).decode() if self._shared.check([key]) else None

    @contextmanager
    def together(self) -> Iterator[None]:
        """Encloses work that all ranks finish or none: a `UserError` on any rank is raised on all of them.

        Nothing inside may wait for another rank.
        """
        failure: str | None = None
        try:
            yield
        except UserError as error:
            failure = str(error)
        failures = [(rank, message) for rank, message in enumerate(self.gather(failure)) if message is not None]
        if failures:
            rank, message = failures[0]
            raise UserError(message if len(failures) == self.world_size else f"rank {rank}: {message}")

    def is_first_to_fail(self) -> bool:
        """True on the one rank that reports why the run failed."""
        if self._store is None:
            return True
        if self._shared is self._store:  # which may have the failures of ranks before a restart
            return self._is_first_on_this_host()
        with suppress(RuntimeError, TimeoutError):
            if not self.heartbeat.is_store_lost:
                return answer(lambda: bool(self._shared.add(_FAILURES, 1) == 1))
        # The store is gone, and with it the rank or the launcher that held it. If that one failed in good order, it has
        # spoken; if it was killed, one rank of each host speaks.
        return not self.heartbeat.someone_failed and self._is_first_on_this_host()

    def _is_first_on_this_host(self) -> bool:
        if sys.platform != "linux":
            return True
        # A name that only one socket can have, and that nobody has to clean up: it goes with the process.
        word = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            word.bind(_word_name())
        except OSError:
            word.close()
        else:
            word.detach()
            self._speaks_for_host = True
        return self._speaks_for_host

    def explain(self, error: Exception) -> Exception:
        """Returns the error to raise in place of one that ended this rank's part of the run.

        It is the same if it is this rank's own. One that came from another rank becomes a `UserError` that names that
        rank and the cause, on the one rank that reports, and an `OtherRankFailedError` on all others.
        """
        is_broken = self.world_size > 1 and is_broken_collective(error)
        if isinstance(error, UserError) and not self.heartbeat.is_beating:
            is_broken = False  # it says more than the heartbeat could
        # The launcher ends all ranks when one has died; the one that says so has to outlive that.
        is_deaf = is_broken and threading.current_thread() is threading.main_thread()
        handler = signal.signal(signal.SIGTERM, signal.SIG_IGN) if is_deaf else None
        self.heartbeat.fail()
        if not self.is_first_to_fail():
            if is_deaf:
                signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)
            explained: Exception = OtherRankFailedError("stopped because another rank failed")
        else:
            explained = UserError(self.heartbeat.explain(error)) if is_broken else error
        if self._shared is not None and not self.heartbeat.is_store_lost:
            with suppress(RuntimeError, TimeoutError):
                answer(lambda: self.count(_HEARD))
        return explained

    def _have_all_heard(self) -> bool:
        """Returns whether no other rank will look for the reason of a failure any more."""
        if self.heartbeat.is_store_lost:
            return self.world_size == 2
        with suppress(RuntimeError, TimeoutError):
            return answer(lambda: self.count(_HEARD, 0) + self.heartbeat.gone() >= self.world_size)
        return False

    def _end_stuck(self, error: BaseException) -> NoReturn:
        """Ends this process from the heartbeat's thread, as the main thread waits in a call that won't return."""
        if self.is_first_to_fail():
            print_error(self.heartbeat.explain(error))
        else:
            time.sleep(5.0)  # so that the launcher does not stop the rank that speaks
        os._exit(EXIT_STATUS)

    def leave(self, *, failed: bool) -> None:
        """Leaves the other ranks: in good order, or after a failure in haste."""
        on_several_hosts = self.world_size > self.ranks_on_host
        if failed and (self.is_main or self._speaks_for_host or on_several_hosts):
            # Who has not heard of the failure before the store goes away would think that this rank was killed.
            self.heartbeat.let_others_hear(self._have_all_heard)
        self.heartbeat.stop()
        # DDP's modules are in reference cycles; as long as one is there, so are the group and its threads.
        gc.collect()
        # After a failure, NCCL would wait here for ranks that don't come; the process ends at once anyway.
        if dist.is_initialized() and not (failed and dist.get_backend() == "nccl"):
            dist.destroy_process_group()


def _attempt() -> str:
    """A name for this start of the ranks: torchrun restarts them in place, with the store of the ranks before.

    With one agent all ranks count the restarts alike; several agents each count their own.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if os.environ.get("GROUP_WORLD_SIZE") == "1" else "0"
    return f"distaccum/{restarts}"


def _end_with_launcher() -> None:
    """Makes the kernel send SIGTERM to this rank when torchrun is killed, which can't do it then.

    The rank saves and ends. Otherwise it would go on, unseen, and keep the run folder from the next torchrun.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        signal_when_parent_ends(signal.SIGTERM)


def _word_name() -> str:
    return f"\0distaccum {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} {_attempt()}"


def _own_address() -> str:
    """The address at which all hosts reach this rank: that from which it connects to the launcher's store.

    A loopback address is replaced by the launcher's name for the host.
    """
    to = socket.getaddrinfo(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], type=socket.SOCK_DGRAM)[0]
    with socket.socket(*to[:2]) as probe:
        probe.connect(to[4])
        address: str = probe.getsockname()[0]
    return os.environ["MASTER_ADDR"] if ipaddress.ip_address(address).is_loopback else address


def _is_said_here() -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        return ear.connect_ex(_word_name()) == 0


def _explain_connecting(error: Exception) -> str:
    reason = " ".join(str(error).split()).partition("$")[0]
    return (
        f"the ranks can't connect to each other: {reason}. Check that the hosts reach each other, and name the network "
        "interface to use with GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME."
    )


def _explain_missing(ranks: list[int]) -> str:
    return (
        f"rank {', '.join(map(str, ranks))} did not start, or has ended: the others have waited for it. See what it "
        "said, here or on the console of its host."
    )


@contextmanager
def joined_world() -> Iterator[World]:
    """Joins the run's other ranks; leaves them in good order, or after a failure in haste.

    Raises:
        UserError: another rank died or hung; says which, and what it was doing.
        OtherRankFailedError: in place of any error that follows from one on another rank (a broken connection, mostly):
            that rank reports it.
    """
    world = World()
    failed = False
    try:
        yield world
        if dist.is_initialized():
            # Leaving while another rank still reads from this one's sockets aborts that rank.
            world.heartbeat.doing("end of the run", waits=True)
            dist.barrier()
    except (Exception, SystemExit) as error:
        failed = True
        explained = world.explain(asked_to_exit(error) if isinstance(error, SystemExit) else error)
        if explained is error:
            raise
        raise explained from error
    finally:
        world.leave(failed=failed)
