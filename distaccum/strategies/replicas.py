"""Which ranks share the shards of a model, which hold the same shard, and the all-reduce between the latter."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

_BUCKET_BYTES = 25 << 20
_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True)
class Layout:
    """The two axes of the ranks over which a model is sharded.

    Attributes:
        shard_group: the ranks that hold one model between them, this one among them.
        replicas: the ranks that hold the same shards as this one; None if it is the only one.
    """

    shard_group: dist.ProcessGroup
    replicas: dist.ProcessGroup | None


def layout_of(mesh: DeviceMesh) -> Layout | None:
    """Returns the layout of a model that is sharded on this mesh; None if the meshes of all ranks don't make one.

    All ranks call it, each with its own mesh: a one-dimensional one, or a two-dimensional one of replicas and shards.
    """
    world = range(dist.get_world_size())
    if mesh.ndim == 2:
        return Layout(mesh.get_group(1), mesh.get_group(0)) if mesh.size() == len(world) else None
    if mesh.ndim != 1:
        return None
    rows: list[tuple[int, ...]] = [()] * len(world)
    dist.all_gather_object(rows, tuple(mesh.mesh.tolist()))
    rows = sorted(set(rows))
    if len({len(row) for row in rows}) != 1 or sorted(rank for row in rows for rank in row) != list(world):
        return None
    if len(rows) == 1:
        return Layout(mesh.get_group(), None)
    columns: list[list[int]] = [list(column) for column in zip(*rows, strict=True)]
    replicas, _ = dist.new_subgroups_by_enumeration(columns)  # type: ignore[no-untyped-call]
    return Layout(mesh.get_group(), replicas)


def mesh_of_shards(device: torch.device, shard_size: int) -> tuple[DeviceMesh, Layout]:
    """Returns the mesh of this rank's neighbours, of `shard_size` ranks with consecutive numbers, and the layout.

    All ranks call it. Nothing is asked of the others, so it works where they are imitated.
    """
    world_size = dist.get_world_size()
    if shard_size == world_size:
        mesh = init_device_mesh(device.type, (shard_size,))
        return mesh, Layout(mesh.get_group(), None)
    group, _ = dist.new_subgroups(shard_size)  # type: ignore[no-untyped-call]
    columns = [list(range(first, world_size, shard_size)) for first in range(shard_size)]
    replicas, _ = dist.new_subgroups_by_enumeration(columns)  # type: ignore[no-untyped-call]
    return DeviceMesh.from_group(group, device.type), Layout(group, replicas)


def all_reduce_parts(
    parts: Sequence[Tensor], group: dist.ProcessGroup, device: torch.device, count: Callable[[Tensor], None]
) -> None:
    """Adds up tensors over the ranks of a group, in place, and in buckets of 25 MiB, two of which are under way.

    Args:
        parts: of the same formats and shapes on all of these ranks; on any device.
        device: where the group's collectives work.
        count: called with each bucket before it is sent.
    """
    under_way: deque[tuple[list[Tensor], Tensor, dist.Work]] = deque()

    def finish_one() -> None:
        members, flat, work = under_way.popleft()
        work.wait()
        pieces = torch.split(flat, [part.numel() for part in members])
        torch._foreach_copy_(members, [piece.view_as(part) for piece, part in zip(pieces, members, strict=True)])

    for bucket in _buckets(parts):
        flat = torch.cat([part.reshape(-1) for part in bucket]).to(device)
        count(flat)
        work = dist.all_reduce(flat, group=group, async_op=True)
        assert work is not None
        under_way.append((bucket, flat, work))
        if len(under_way) == _IN_FLIGHT:
            finish_one()
    while under_way:
        finish_one()


def _buckets(parts: Sequence[Tensor]) -> list[list[Tensor]]:
    """Puts tensors of one format together, in their order; empty ones are left out."""
    found: list[list[Tensor]] = []
    open_buckets: dict[torch.dtype, tuple[list[Tensor], int]] = {}
    for part in parts:
        if not part.numel():
            continue
        members, size = open_buckets.get(part.dtype, ([], _BUCKET_BYTES))
        if size + part.nbytes > _BUCKET_BYTES:
            members, size = [], 0
            found.append(members)
        members.append(part)
        open_buckets[part.dtype] = members, size + part.nbytes
    return found
