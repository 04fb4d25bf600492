"""Frozen weights that a checkpoint leaves out: by a fingerprint it is seen whether a model has the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distaccum.checkpoints.folder import Checkpoint
from distaccum.errors import UserError, listed
from distaccum.runtime.sharded import is_sharded, local_part

_FACTOR = 0x9E3779B97F4A7C16 - (1 << 64)
"""K of the fingerprint: 2⁶⁴ divided by the golden ratio, as int64 has it; even, so that each i K + 1 is odd, and one
element that has changed is always seen."""
_MOST_NUMBERS = 1 << 20
"""How many elements are taken at a time."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def frozen_parameters(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns the parameters that the optimizer doesn't have, by name. It has those that are unfrozen on the way."""
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {name: part.detach() for name, part in module.named_parameters() if id(part) not in trained}


def fingerprints(
    tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None, dtypes: Mapping[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """Returns format, shape and fingerprint of tensors, sharded or whole, by name, as JSON values.

    All ranks of the group call it with the same names, and get the same: of whole tensors, rank 0's.

    Args:
        dtypes: formats to cast the tensors to first, by name. Default: their own.
    """
    kinds = {name: getattr(torch, dtypes[name]) if dtypes else tensor.dtype for name, tensor in tensors.items()}
    sums = torch.zeros(len(tensors), dtype=torch.int64)
    for number, (name, tensor) in enumerate(tensors.items()):
        if _counts_here(tensor, group):
            sums[number] = _own_sum(tensor, kinds[name])
    if group is not None:
        dist.all_reduce(sums, group=group)
    return {
        name: {
            "dtype": str(kinds[name]).removeprefix("torch."),
            "shape": list(tensor.shape),
            "fingerprint": f"{total % (1 << 64):016x}",
        }
        for (name, tensor), total in zip(tensors.items(), sums.tolist(), strict=True)
    }


def _counts_here(tensor: Tensor, group: dist.ProcessGroup | None) -> bool:
    """Whether this rank's part of a tensor is counted: of several ranks with the same part, the first one's is."""
    if not is_sharded(tensor):
        return group is None or dist.get_rank() == 0
    mesh = tensor.device_mesh
    if 0 not in mesh.mesh:
        return False  # a mesh of each replica's own ranks, and these are not the first ones
    place = mesh.get_coordinate() or ()
    return all(number == 0 for number, kind in zip(place, tensor.placements, strict=True) if kind.is_replicate())


def _own_sum(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns Σ bitsᵢ · (i K + 1) mod 2⁶⁴ over the elements that this rank has of a tensor, as an int64 scalar.

    i is an element's place in the whole tensor, so the sums of its parts add up to that of the whole.
    """
    part, slices = local_part(tensor)
    strides = [1]
    for size in reversed(tensor.shape[1:]):
        strides.insert(0, strides[0] * size)
    if not part.ndim:
        part, slices = part[None], (slice(0, 1),)
    factors = torch.ones((), dtype=torch.int64, device=part.device)
    for own, stride in zip(slices[1:], strides[1:], strict=True):
        factors = factors[..., None] + torch.arange(own.start, own.stop, device=part.device) * stride * _FACTOR
    rows = max(1, _MOST_NUMBERS // max(1, factors.numel()))
    total = torch.zeros((), dtype=torch.int64, device=part.device)
    for first in range(0, len(part), rows):
        bits = part[first : first + rows].to(dtype).contiguous().view(_INTEGERS[dtype.itemsize])
        numbers = torch.arange(first, first + len(bits), device=part.device) + slices[0].start
        begins = (numbers * strides[0] * _FACTOR).reshape(-1, *(1 for _ in factors.shape))
        total += (bits * (begins + factors)).sum()
    return total


def check_same_frozen(checkpoint: Checkpoint, members: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Refuses a model whose frozen weights are not those that a checkpoint has left out.

    They are compared in the checkpoint's format.

    Args:
        members: the model's tensors by name, those of the checkpoint among them.
        group: the ranks, which all call it. None: this process reads alone.

    Raises:
        UserError: names what differs.
    """
    wanted = checkpoint.frozen
    if not wanted:
        return
    dtypes = {name: entry["dtype"] for name, entry in wanted.items()}
    found = fingerprints({name: members[name] for name in wanted}, group, dtypes)
    if different := [name for name, entry in wanted.items() if found[name] != entry]:
        name = different[0]
        there = f"{dtypes[name]} {wanted[name]['fingerprint']}"
        here = f"{found[name]['dtype']} {found[name]['fingerprint']}"
        if members[name].dtype is not getattr(torch, dtypes[name]):
            here += f", cast from {members[name].dtype}"
        raise UserError(
            f"the checkpoint {checkpoint.path} leaves out {len(wanted)} frozen weights, which the model must have from "
            f"its start, and some are others here: {listed(different, 3)} (fingerprint: {there} there, {here} here). "
            "Give the model that the run began with, by model.name_or_path or model.init_from and in the run's "
            "precision. With checkpoint.trainable_only=false a run saves all weights."
        )
