"""Nests of tensors: walks through them, moves them, and gathers their rows, or any object, from all ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distaccum.errors import UserError
from distaccum.runtime.devices import own_kind

T = TypeVar("T")

# torch 2.13 has renamed it, and warns of the old name.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_PLAIN = frozenset((Tensor, str, bytes, int, float, bool))
"""Types of the usual leaves, checked first: asking whether something is a mapping takes ten times as long."""


def leaves(value: Any) -> list[Any]:
    """Returns the leaves of a nest of tuples, lists and mappings, in a fixed order: tensors and all else in it."""
    if isinstance(value, Mapping):
        value = list(value.values())
    elif not isinstance(value, tuple | list):
        return [value]
    if _PLAIN.issuperset(map(type, value)):
        return list(value)
    found = []
    for entry in value:
        if type(entry) in _PLAIN:
            found.append(entry)
        else:
            found += leaves(entry)
    return found


def mapped(value: Any, function: Callable[[Any], Any], is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """A nest of the same types, with each of its `leaves` replaced, in their order.

    Args:
        is_leaf: whether a mapping is to be replaced as one, instead of what it holds.
    """
    if type(value) in _PLAIN:
        return function(value)
    if isinstance(value, Mapping) and (is_leaf is None or not is_leaf(value)):
        return like(value, [mapped(entry, function, is_leaf) for entry in value.values()])
    if isinstance(value, tuple | list):
        return like(value, [mapped(entry, function, is_leaf) for entry in value])
    return function(value)


def like(value: Any, entries: list[Any]) -> Any:
    """A tuple, list or mapping of the type of another one, with other entries; a dict if a mapping can't be made so."""
    if isinstance(value, Mapping):
        filled = dict(zip(value, entries, strict=True))
        if not isinstance(value, MutableMapping):
            return filled
        try:
            return type(value)(filled)  # type: ignore[call-arg]
        except TypeError:  # of a defaultdict, say, which takes its factory first
            found = copy.copy(value)
            found.update(filled)
            return found
    return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of a nest."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]


def leaves_of(embeddings: Any) -> list[Tensor]:
    """The tensors of a nest that must hold nothing else.

    Raises:
        UserError: it does.
    """
    found = leaves(embeddings)
    for leaf in found:
        if not isinstance(leaf, Tensor):
            kind = type(leaf).__name__
            raise UserError(f"embeddings are tensors, or tuples, lists or dictionaries of them; got a {kind}.")
    return found


def rebuilt(value: Any, tensors: Sequence[Tensor]) -> Any:
    """A nest of the same form, of other tensors."""
    remaining = iter(tensors)
    return mapped(value, lambda _: next(remaining))


def number_of_rows(value: Any) -> int:
    """The common size of the first dimension of a nest's tensors.

    Raises:
        UserError: there is none.
    """
    tensors = leaves_of(value)
    sizes = {len(tensor) if tensor.ndim else None for tensor in tensors}
    if len(sizes) != 1 or None in sizes:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
        raise UserError(
            f"embeddings must have one row for each sample, all of the same number of rows; got shapes {shapes}."
        )
    return len(tensors[0])


def gather_rows(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> tuple[list[Tensor], int]:
    """Rows of all ranks, in the order of the ranks. The host waits for the device, to read how many there are.

    Args:
        tensors: `[rows, …]` each; of the same number of rows on a rank, and of the same shape otherwise on all.
        group: the ranks; None if there is only this one.

    Returns:
        Tensors `[rows of all ranks, …]`, detached, and the place of this rank's first row in them.
    """
    if group is None:
        return [tensor.detach() for tensor in tensors], 0
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    mine = torch.tensor([len(tensors[0])], device=tensors[0].device)
    everyone = torch.empty(ranks, dtype=mine.dtype, device=mine.device)
    _all_gather(everyone, mine, group=group)
    counts: list[int] = everyone.tolist()
    return [_gathered(tensor.detach(), counts, group) for tensor in tensors], sum(counts[:rank])


def _gathered(tensor: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    # Padded to the longest: one collective of equal parts is what every backend has.
    longest = max(counts)
    padded = tensor.new_zeros(longest, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    everyone = tensor.new_empty(len(counts) * longest, *tensor.shape[1:])
    _all_gather(everyone, padded, group=group)
    return torch.cat([everyone[rank * longest :][:count] for rank, count in enumerate(counts)])


def gather_objects(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """Every rank's value, in the order of the ranks. All ranks call it. Values must be picklable."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def to_device(batch: Any, device: torch.device, *, non_blocking: bool = False, float_dtype: torch.dtype | None) -> Any:
    """Moves every tensor of a nest to a device.

    Args:
        batch: an object in it with a `to` method of its own is moved by that (also a mapping, unless it is a `dict`);
            anything else stays as it is.
        float_dtype: floating-point tensors are cast to it, complex ones to its counterpart; None leaves them.
    """

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            dtype = own_kind(leaf, float_dtype) if float_dtype is not None else None
            return leaf.to(device=device, dtype=dtype, non_blocking=non_blocking)
        return leaf.to(device) if hasattr(leaf, "to") else leaf

    return mapped(batch, move, lambda mapping: not isinstance(mapping, dict) and hasattr(mapping, "to"))
