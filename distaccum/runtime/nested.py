"""Nests of tensors: walking through them, moving them, and gathering their rows from all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distaccum.errors import UserError
from distaccum.runtime.devices import _own_kind

# torch 2.13 has renamed it, and warns of the old name.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def mapped(value: Any, function: Callable[[Tensor], Any], other: Callable[[Any], Any] | None = None) -> Any:
    """A nest of tuples, lists and mappings, of the same types, with each of its tensors replaced, in a fixed order.

    Args:
        other: replaces what is none of these; a mapping with a `to` of its own counts as such, unless it is a dict.

    Raises:
        UserError: without `other`, it holds anything but tensors.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict) or (isinstance(value, Mapping) and (other is None or not hasattr(value, "to"))):
        entries: Any = {key: mapped(entry, function, other) for key, entry in value.items()}
        try:
            return type(value)(entries)  # type: ignore[call-arg]
        except TypeError:  # a defaultdict, say, which takes its factory first
            return entries
    if isinstance(value, tuple | list):
        entries = [mapped(entry, function, other) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    if other is None:
        kind = type(value).__name__
        raise UserError(f"embeddings are tensors, or tuples, lists or dictionaries of them; got a {kind}.")
    return other(value)


def leaves_of(value: Any) -> list[Tensor]:
    """The tensors of a nest, in the order of `mapped`, which must hold nothing else."""
    found: list[Tensor] = []
    mapped(value, found.append)
    return found


def rebuilt(value: Any, leaves: Sequence[Tensor]) -> Any:
    """A nest of the same form, of other tensors."""
    remaining = iter(leaves)
    return mapped(value, lambda _: next(remaining))


def number_of_rows(value: Any) -> int:
    """The common size of the first dimension of a nest's tensors.

    Raises:
        UserError: there is none.
    """
    leaves = leaves_of(value)
    sizes = {len(leaf) if leaf.ndim else None for leaf in leaves}
    if len(sizes) != 1 or None in sizes:
        shapes = ", ".join(str(list(leaf.shape)) for leaf in leaves)
        raise UserError(
            f"embeddings must have one row for each sample, all of the same number of rows; got shapes {shapes}."
        )
    return len(leaves[0])


def gather_rows(leaves: Sequence[Tensor], group: dist.ProcessGroup | None) -> tuple[list[Tensor], int]:
    """Rows of all ranks, in the order of the ranks. The host waits for the device, to learn how many there are.

    Args:
        leaves: tensors `[rows, …]`; of the same number of rows on a rank, and of the same shape otherwise on all.
        group: the ranks; None if there is only this one.

    Returns:
        Tensors `[rows of all ranks, …]`, detached, and the place of this rank's first row in them.
    """
    if group is None:
        return [leaf.detach() for leaf in leaves], 0
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    mine = torch.tensor([len(leaves[0])], device=leaves[0].device)
    everyone = torch.empty(ranks, dtype=mine.dtype, device=mine.device)
    _all_gather(everyone, mine, group=group)
    counts: list[int] = everyone.tolist()
    return [_gathered(leaf.detach(), counts, group) for leaf in leaves], sum(counts[:rank])


def _gathered(leaf: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    # Padded to the longest: one collective of equal parts is what every backend has.
    longest = max(counts)
    padded = leaf.new_zeros(longest, *leaf.shape[1:])
    padded[: len(leaf)] = leaf
    everyone = leaf.new_empty(len(counts) * longest, *leaf.shape[1:])
    _all_gather(everyone, padded, group=group)
    return torch.cat([everyone[rank * longest :][:count] for rank, count in enumerate(counts)])


def to_device(batch: Any, device: torch.device, *, non_blocking: bool = False, float_dtype: torch.dtype | None) -> Any:
    """Moves every tensor of a (nested) batch to a device.

    Args:
        batch: a tensor, or tuples, lists and mappings of tensors; an object with a `to` method of its own is moved by
            that, anything else stays as it is.
        float_dtype: floating-point tensors are cast to it, complex ones to its counterpart; None leaves them.
    """

    def move(tensor: Tensor) -> Tensor:
        dtype = _own_kind(tensor, float_dtype) if float_dtype is not None else None
        return tensor.to(device=device, dtype=dtype, non_blocking=non_blocking)

    return mapped(batch, move, lambda value: value.to(device) if hasattr(value, "to") else value)


def tensors_of(batch: Any) -> list[Tensor]:
    """All tensors of a (nested) batch."""
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        batch = batch.values()
    elif not isinstance(batch, tuple | list):
        return []
    return [tensor for value in batch for tensor in tensors_of(value)]
