"""A sum over the micro-steps of a window that takes the memory of one of its terms."""

from __future__ import annotations

import torch
from torch import Tensor


class RunningSum:
    """Adds up tensors of one shape in float64, which is exact for whole numbers.

    Attributes:
        total: the sum so far, on the device of the terms; it shares no memory with them.
        count: number of terms.
        shapes: of the terms. If they are not all the same, `total` is of those like the first one.
    """

    __slots__ = ("count", "shapes", "total")

    def __init__(self, first: Tensor) -> None:
        self.total = first.detach().to(torch.float64, copy=True)
        self.count = 1
        self.shapes = {first.shape}

    def add(self, value: Tensor) -> None:
        """Adds a term, without making the host wait for the device; of another shape, notes the shape alone."""
        self.count += 1
        self.shapes.add(value.shape)
        if value.shape != self.total.shape:
            return
        if value.device != self.total.device:  # a number of Python's beside a tensor on the device
            device = value.device if self.total.device.type == "cpu" else self.total.device
            self.total, value = (part.to(device, non_blocking=True) for part in (self.total, value))
        self.total += value.detach()
