"""What the accumulator needs of a model that has been placed on devices."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Traffic:
    """Counts the collectives that carry gradients, on this rank.

    Attributes:
        calls: number of collectives.
        bytes: bytes of the tensors handed to them.
        last_launch: mark of the stopwatch at the launch of the latest one, or None.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.bytes = 0
        self.last_launch: Any = None

    def count(self, tensor: Tensor) -> None:
        self.calls += 1
        self.bytes += tensor.nbytes


class Strategy(Protocol):
    """A placed model. Few methods, and no registry: a strategy is chosen in `distaccum.strategies.place`.

    Attributes:
        model: what to call in a micro-step.
        module: the user's own module inside it, for evaluations and checkpoints.
        device: where this rank's parameters are.
        world_size: number of ranks whose gradients are averaged in the sync.
        process_group: the group of those ranks, or None when there is only this one.
        traffic: the collectives that carried gradients so far.
    """

    @property
    def model(self) -> nn.Module: ...
    @property
    def module(self) -> nn.Module: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def world_size(self) -> int: ...
    @property
    def process_group(self) -> dist.ProcessGroup | None: ...
    @property
    def traffic(self) -> Traffic: ...

    def no_sync(self) -> AbstractContextManager[None]:
        """Encloses forward *and* backward of a micro-step that is not the window's last: gradients stay on the rank."""
        ...

    def share_buffers(self) -> None:
        """Makes buffers (BatchNorm statistics) the same on all ranks, if the strategy keeps them the same at all."""
        ...
