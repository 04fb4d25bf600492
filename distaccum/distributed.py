"""The ranks of a run: joining them, agreeing on things, failing together and being heard once."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from distaccum.errors import OtherRankFailedError, UserError

T = TypeVar("T")

_FAILURES = "distaccum/failures"


class World:
    """All ranks of this run, seen from one of them. Made by `joined_world`.

    Attributes:
        rank, local_rank, world_size: as in torch.distributed; 0, 0 and 1 without a launcher.
        launched: True under torchrun, or any launcher that sets the same environment.

    Raises:
        UserError: a launcher has set only a part of what the ranks need to find each other.
    """

    def __init__(self) -> None:
        self.launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        self.rank, self.local_rank, self.world_size = 0, 0, 1
        self._store: Any = None  # a torch.distributed.Store
        if self.launched:
            self.rank = int(os.environ["RANK"])
            self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
            self.world_size = int(os.environ["WORLD_SIZE"])
            try:
                self._store, _, _ = next(rendezvous("env://", self.rank, self.world_size))
            except ValueError as error:
                raise UserError(f"the ranks can't find each other: {error}. Start them with torchrun.") from error

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def init_process_group(self, device: torch.device) -> None:
        """Connects the ranks: NCCL between GPUs, gloo between CPUs. Nothing to do without a launcher."""
        if self._store is None:
            return
        on_cuda = device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_cuda else "gloo",
            store=self._store,
            rank=self.rank,
            world_size=self.world_size,
            device_id=device if on_cuda else None,
        )

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks, on every rank. Values must be picklable."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """A stretch of work that all ranks finish or none: a `UserError` on any rank is raised on all of them.

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
        """True on the one rank that is to say why the run failed."""
        if self._store is None:
            return True
        try:
            return bool(self._store.add(_FAILURES, 1) == 1)
        except RuntimeError:
            # The store is gone, and with it the rank or the launcher that held it: that one has spoken.
            return False


@contextmanager
def joined_world() -> Iterator[World]:
    """Joins the run's other ranks; leaves them in good order, or after a failure in haste.

    Raises:
        OtherRankFailedError: in place of any error that comes second to one on another rank (a broken connection,
            mostly): that rank says why, this one has nothing to add.
    """
    world = World()
    failed = False
    try:
        yield world
        if dist.is_initialized():
            # Leaving while another rank still reads from this one's sockets aborts that rank.
            dist.barrier()
    except Exception as error:
        failed = True
        if world.is_first_to_fail():
            raise
        raise OtherRankFailedError("stopped because another rank failed") from error
    finally:
        # DDP's modules are in reference cycles; as long as one is there, so are the group and its threads.
        gc.collect()
        # After a failure, NCCL would wait here for ranks that don't come; the process ends at once anyway.
        if dist.is_initialized() and not (failed and dist.get_backend() == "nccl"):
            dist.destroy_process_group()
