"""Copies of a run's tensors on the CPU, which are written while the live ones go on changing."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor

from distaccum.runtime.sharded import is_sharded
from distaccum.strategies import local_parts


class Staging:
    """Memory for copies of tensors, which is used again as long as names, shapes and formats stay the same.

    Copies of one format lie in one piece of memory: twenty thousand small tensors are then copied in one call, not in
    twenty thousand.
    """

    def __init__(self) -> None:
        self._layout: list[tuple[str, torch.Size, torch.dtype]] = []
        self._copies: dict[str, Tensor] = {}
        self._has_sharded = False

    def copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns copies of tensors on the CPU, each contiguous, in their order. The copies before change with them."""
        layout = [(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]
        if layout != self._layout:
            self._copies.clear()  # before the new ones take memory
            self._copies, self._layout = _places(tensors), layout
            self._has_sharded = any(map(is_sharded, tensors.values()))
        copies, originals = list(self._copies.values()), list(tensors.values())
        if self._has_sharded:
            copies, originals = local_parts(copies), local_parts(originals)
        if copies:
            with torch.no_grad():
                torch._foreach_copy_(copies, originals)
        return dict(self._copies)


def _places(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors of the same names, shapes and formats on the CPU, of whatever values."""
    places: dict[str, Tensor] = {}
    for dtype in {tensor.dtype for tensor in tensors.values()}:
        whole = {name: t for name, t in tensors.items() if t.dtype == dtype and not is_sharded(t)}
        sizes = [tensor.numel() for tensor in whole.values()]
        memory = torch.empty(sum(sizes), dtype=dtype)
        for (name, tensor), size, end in zip(whole.items(), sizes, accumulate(sizes), strict=True):
            places[name] = memory[end - size : end].view(tensor.shape)
    sharded = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items() if is_sharded(tensor)}
    return {name: sharded[name] if name in sharded else places[name] for name in tensors}
