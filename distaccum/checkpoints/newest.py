"""Finds the newest whole state of a run anywhere: in its folder of checkpoints, or in the memory of its nodes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from distaccum.checkpoints.folder import (
    Checkpoint,
    DamagedCheckpointError,
    checked,
    checkpoints_in,
    clear_leftovers,
    commit,
    name_of,
    read_checkpoint,
    start_writing,
    update_of,
    verify_files,
    write_manifest,
    writing_path,
)
from distaccum.checkpoints.memory_place import Gather, MemoryPlace, failed_together, memory_place, nodes_of
from distaccum.errors import UserError
from distaccum.runtime.files import sync

logger = logging.getLogger(__name__)


def newest_anywhere(checkpoints: Path, *, rank: int, gather: Gather) -> Checkpoint | None:
    """The newest state of a run whose files are all as they were written, on the disk or in memory.

    One that lies in the memory of several nodes is brought to the disk. Damaged ones are named in the log and passed
    over. All ranks call it, and get the same.

    Args:
        checkpoints: the run's folder of checkpoints.

    Raises:
        UserError: the newest one lies in the memory of several nodes, and can't be brought to the disk.
    """
    place = memory_place(checkpoints, rank=rank, gather=gather)
    place.clear_others()
    on_disk = {update_of(path): path for path in gather(checkpoints_in(checkpoints) if rank == 0 else None)[0]}
    here = checkpoints_in(place.folder) if place.is_own() else []
    in_memory = {update for updates in gather([update_of(path) for path in here]) for update in updates}
    for update in sorted(on_disk.keys() | in_memory, reverse=True):
        if update in on_disk:
            checkpoint, problems = checked(on_disk[update], rank=rank, gather=gather)
            if checkpoint is not None:
                return checkpoint
            if rank == 0:
                logger.warning("the checkpoint %s is damaged and passed over: %s", on_disk[update], problems)
        if update in in_memory:
            checkpoint, problems = _of_memory(place, update, checkpoints, rank=rank, gather=gather)
            if checkpoint is not None:
                if rank == 0 and update > max(on_disk, default=-1):
                    saved = f"the newest on the disk, of update {max(on_disk)}" if on_disk else "any on the disk"
                    logger.info("the state of update %d, in memory, is newer than %s", update, saved)
                return checkpoint
            if rank == 0:
                logger.warning("the state of update %d in memory is not whole and passed over: %s", update, problems)
    return None


def _of_memory(
    place: MemoryPlace, update: int, checkpoints: Path, *, rank: int, gather: Gather
) -> tuple[Checkpoint | None, str]:
    """The state of an update in memory, or None and what is wrong with it; the same on all ranks."""
    path, nodes = place.folder / name_of(update), nodes_of(gather)
    if len(nodes) == 1:
        checkpoint, problems = checked(path, rank=rank, gather=gather)
        return (replace(checkpoint, is_in_memory=True) if checkpoint is not None else None), problems
    return _brought_to_disk(path, next(node for node in nodes if rank in node), checkpoints, rank=rank, gather=gather)


@dataclass(frozen=True, slots=True)
class _Holding:
    """A rank's part in a state in the memory of its node.

    Attributes:
        manifest: hash of the manifest there; None without one.
        wanted: all files that the manifest names.
        files: those that this rank has found as they were written; ranks of a node share in looking.
        problem: what is wrong there.
    """

    manifest: str | None
    wanted: frozenset[str] = frozenset()
    files: frozenset[str] = frozenset()
    problem: str | None = None


def _brought_to_disk(
    path: Path, node: list[int], checkpoints: Path, *, rank: int, gather: Gather
) -> tuple[Checkpoint | None, str]:
    """Copies a state that lies in the memory of several nodes into the run's folder, each file from one of them.

    So the ranks that go on, on whatever nodes, need no other way to read it than any checkpoint.
    """
    checkpoint, own = _found(path, node.index(rank), len(node))
    holdings: list[_Holding] = gather(own)
    for manifest in dict.fromkeys(holding.manifest for holding in holdings if holding.manifest is not None):
        holders = {
            file: number
            for number, holding in reversed(list(enumerate(holdings)))
            if holding.manifest == manifest
            for file in holding.files
        }
        leader = next(number for number, holding in enumerate(holdings) if holding.manifest == manifest)
        if holdings[leader].wanted <= holders.keys():
            break
    else:
        problems = dict.fromkeys(holding.problem for holding in holdings if holding.problem is not None)
        return None, "; ".join(problems) or "files of nodes that are gone are missing"
    update = update_of(path)
    writing = writing_path(checkpoints, update)

    def begin() -> None:
        if rank == leader:
            start_writing(checkpoints, update)

    def copy() -> None:
        _copied(path, writing, (file for file, holder in holders.items() if holder == rank))

    def end() -> None:
        if rank == leader:
            assert checkpoint is not None
            write_manifest(writing, checkpoint.manifest)
            commit(writing, update)

    for step in (begin, copy, end):
        if (problem := failed_together(step, gather)) is not None:
            if rank == 0:
                clear_leftovers(checkpoints)
            raise UserError(
                f"the newest state of the run, of update {update}, lies in the memory of its nodes and can't be "
                f"brought to {checkpoints}: {problem}. Put that right and start the same command again on these "
                "nodes: it stays in their memory."
            )
    return checked(checkpoints / name_of(update), rank=rank, gather=gather)


def _found(path: Path, part: int, parts: int) -> tuple[Checkpoint | None, _Holding]:
    """Looks at a part of the files of a state in this node's memory."""
    if not path.exists():
        return None, _Holding(None)
    try:
        checkpoint = read_checkpoint(path)
    except DamagedCheckpointError as error:
        return None, _Holding(None, problem=str(error))
    files, problem = [], None
    for file in checkpoint.files[part::parts]:
        if os.path.lexists(path / file):
            try:
                verify_files(checkpoint, [file])
                files.append(file)
            except DamagedCheckpointError as error:
                problem = str(error)
    manifest = hashlib.blake2b(json.dumps(checkpoint.manifest).encode()).hexdigest()
    return checkpoint, _Holding(manifest, frozenset(checkpoint.files), frozenset(files), problem)


def _copied(source: Path, target: Path, files: Iterable[str]) -> None:
    for file in files:
        shutil.copyfile(source / file, target / file)
        sync(target / file)
