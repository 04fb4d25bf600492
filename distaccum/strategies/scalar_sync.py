"""Sums of a few numbers over the ranks, in a collective of their own or in one message with gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

_MOST_ELEMENTS = 1 << 16
"""The most elements that the numbers may add to a message of gradients; more get a collective of their own."""


def summed_beside(numbers: Tensor, group: dist.ProcessGroup | None) -> Callable[[], Tensor]:
    """Starts to add up a vector over the ranks; returns a function that waits for the sum and returns it."""
    if group is None:
        return lambda: numbers
    work = dist.all_reduce(numbers, group=group, async_op=True)
    assert work is not None

    def wait() -> Tensor:
        work.wait()
        return numbers

    return wait


class FirstBucketScalars:
    """Sends a vector of numbers in one message with the first bucket of gradients, without a collective of its own.

    A message is added up in the gradients' format, in which the numbers would be rounded. So each rank writes the bytes
    of its numbers into places of its own, one byte an element, where the other ranks have zeros: every format holds
    these exactly. The ranks' numbers are then added up in float64, in the same order on each rank.

    Measured on gloo with two ranks on two cores, an update of 6.7 ms took 11 % longer with a collective for the numbers
    and 2 % with this. On CUDA a small collective hides behind the backward, and copying buckets together would cost.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._rank, self._world_size = dist.get_rank(group), dist.get_world_size(group)
        self._waiting: Tensor | None = None
        self._places: Tensor | None = None

    def start(self, numbers: Tensor) -> Callable[[], Tensor]:
        """Has a vector of float64 sent with the next bucket; returns what gives its sum, after the backward."""
        if numbers.numel() * 8 * self._world_size > _MOST_ELEMENTS:
            return summed_beside(numbers, self._group)
        self._waiting, self._places = numbers, None
        return self._sum

    def drop(self) -> None:
        """Forgets numbers that no bucket has been sent with."""
        self._waiting = None

    def encoded(self, dtype: torch.dtype) -> Tensor | None:
        """The waiting numbers as elements of a bucket's format, to be sent with it; None if there are none."""
        if self._waiting is None:
            return None
        numbers, self._waiting = self._waiting, None
        self._places = torch.zeros(self._world_size, numbers.numel() * 8, dtype=dtype)
        self._places[self._rank] = numbers.view(torch.uint8)
        return self._places

    def _sum(self) -> Tensor:
        if self._waiting is not None:  # no bucket was sent
            numbers, self._waiting = self._waiting, None
            return summed_beside(numbers, self._group)()
        assert self._places is not None
        return self._places.to(torch.uint8).view(torch.float64).sum(0)
