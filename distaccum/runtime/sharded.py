"""Recognises sharded tensors without importing their class, and finds a rank's part of them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(value: Any) -> TypeGuard[DTensor]:
    """Whether a value is a `DTensor`.

    Importing that class takes 0.75 s, and there is none of its objects before somebody has imported it.
    """
    cls: Any = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return cls is not None and isinstance(value, cls)


def local_slices(tensor: DTensor) -> tuple[slice, ...]:
    """The part of a sharded tensor that this rank holds, as slices of the whole, one for each dimension.

    Raises:
        ValueError: the tensor is sharded in another way than in consecutive pieces.
    """
    bounds = [(0, size) for size in tensor.shape]
    places: Iterable[Any] = tensor.placements
    for place, ranks, rank in zip(places, tensor.device_mesh.shape, _coordinate(tensor), strict=True):
        if type(place).__name__ == "Shard":
            first, last = bounds[place.dim]
            length = -(-(last - first) // ranks)
            bounds[place.dim] = (min(first + length * rank, last), min(first + length * (rank + 1), last))
        elif not place.is_replicate():
            raise ValueError(f"a part of a tensor that is placed as {place} can't be told")
    return tuple(slice(first, last) for first, last in bounds)


def _coordinate(tensor: DTensor) -> list[int]:
    found = tensor.device_mesh.get_coordinate()
    if found is None:
        raise ValueError("this rank is not one of the tensor's")
    return list(found)


def local_part(tensor: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """Returns what this rank holds of a tensor (not a copy), and which part of the whole it is."""
    if not is_sharded(tensor):
        return tensor.detach(), tuple(slice(0, size) for size in tensor.shape)
    return tensor.to_local().detach(), local_slices(tensor)
