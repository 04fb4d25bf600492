"""Ranks that aren't there: a process group of any size in one process, whose collectives return at once.

What a rank holds in memory doesn't depend on what the others send, so it can be measured without them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def fake_ranks(world_size: int) -> Iterator[None]:
    """Makes this process rank 0 of `world_size`. With 1, there is no process group at all."""
    if world_size == 1:
        yield
        return
    assert not dist.is_initialized(), "there are real ranks already"
    # Here and not above: torch keeps it among its own tests' helpers, and it is needed for nothing else.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own helpers, among themselves
        from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
