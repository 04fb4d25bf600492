"""Keeps the newest states of a run in memory that outlives its processes, written beside the training.

A state is written as a checkpoint on the disk is, by the same code, but into a folder of each node's memory (see
`memory_place.py`). A node holds the manifest and the files that its own ranks have written. With several nodes, each
rank also sends its file to the node after its own, so that every file lies on two nodes, and any one of them may
vanish.

A node has room for two states: the newest that is whole on all nodes, and the one that is being written.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from distaccum.checkpoints.folder import Checkpoint, commit, name_of, start_writing, write_manifest, writing_path
from distaccum.checkpoints.memory_place import (
    VARIABLE,
    Gather,
    failed_together,
    memory_place,
    memory_root,
    nodes_of,
)
from distaccum.checkpoints.staging import Staging
from distaccum.checkpoints.state import reasons, write_tensors
from distaccum.checkpoints.storage import ManifestWriter, file_of
from distaccum.errors import UserError
from distaccum.runtime.diagnosis import is_broken_collective
from distaccum.runtime.memory import free_memory
from distaccum.runtime.nested import gather_objects

logger = logging.getLogger(__name__)

_PIECE_BYTES = 64 << 20
"""How much is sent to another node at a time."""


class MemoryCheckpoints:
    """The newest states of a run in its nodes' memory. All ranks call all methods alike.

    Args:
        checkpoints: the run's folder of checkpoints.
        rank: of this process.
        group: for this object alone, as its collectives run in a thread beside the training's. None: one process.
        files: other files of the run, which are brought to the disk where a node that vanishes would take them along.

    Attributes:
        last: update of the newest state that is whole on all nodes; None if there is none.

    Raises:
        UserError: this machine has no such memory.
    """

    def __init__(
        self, checkpoints: Path, rank: int, group: dist.ProcessGroup | None, files: Sequence[Path] = ()
    ) -> None:
        self.group, self._rank = group, rank
        self._gather: Gather = lambda value: gather_objects(value, group)
        self._place = memory_place(checkpoints, rank=rank, gather=self._gather, draw=True)
        self._nodes = nodes_of(self._gather)
        self._files = files if len(self._nodes) > 1 else ()
        self.last: int | None = None
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._has_room = self._is_failing = False
        if (problem := failed_together(self._make, self._gather)) is not None:
            raise UserError(
                f"checkpoint.memory_every_updates can't keep states in {memory_root()}: {problem}. Name another file "
                f"system in memory (tmpfs) in the environment variable {VARIABLE}, or leave the key out."
            )
        if rank == 0:
            logger.info("the newest states are kept in memory, in %s", self._place.root)

    def _make(self) -> None:
        self._place.make()
        self._place.clear_others()

    @property
    def is_busy(self) -> bool:
        """Whether a state is still being written on this rank."""
        return self._thread is not None and self._thread.is_alive()

    def goes_on_from(self, checkpoint: Checkpoint) -> None:
        """Keeps the state that a run goes on from, if it lies in memory, until the next one is whole."""
        self.last = checkpoint.update if checkpoint.path.parent == self._place.folder else None

    def save(self, update: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Copies the state after an update, and begins to write it. `wait` has to have been called."""
        assert self._thread is None
        copies = self._staging.copied(tensors)
        arguments = (update, copies, json.loads(json.dumps(state)))  # what is alive goes on changing
        self._thread = threading.Thread(target=self._write, args=arguments, name="state in memory", daemon=True)
        self._thread.start()

    def join(self, timeout: float | None = None) -> None:
        """Waits until nothing is being written any more."""
        if self._thread is not None:
            self._thread.join(timeout)
            if not self._thread.is_alive():
                self._thread = None

    def wait(self) -> None:
        """Waits until the state before is whole on all nodes.

        Raises:
            UserError: there is no room for two states.
            Exception: a rank that has died or hangs was waited for in vain.
        """
        self.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, update: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        writer = _NodeWriter(
            folder=self._place.folder,
            update=update,
            rank=self._rank,
            state=state,
            files=self._files,
            nodes=self._nodes,
            gather=self._gather,
            keep=self.last,
            has_room=self._has_room,
        )
        try:
            write_tensors(writer, tensors, self.group)
            self._end(writer)
        except (Exception, CheckpointException) as error:
            if writer.refusal is not None:
                self._error = UserError(writer.refusal)
            elif is_broken_collective(error):
                self._error = error
            else:  # whatever it is, training goes on
                self._report_failure(update, error)
            return
        self.last, self._has_room, self._is_failing = update, True, False

    def _end(self, writer: _NodeWriter) -> None:
        """Makes a state that has been written count on all nodes; the one before does until then."""
        manifest = self._gather(writer.manifest)[0]
        writing = writing_path(writer.folder, writer.update)
        if len(self._nodes) > 1:
            self._exchange(writing, manifest["files"])
            self._gather(None)  # a node's files are all there

        def name() -> None:
            if writer.is_first_of_node:
                write_manifest(writing, manifest)
                commit(writing, writer.update)

        # The next one, which takes the place of the one before, begins when all nodes have come here.
        self._agree(failed_together(name, self._gather))

    def _exchange(self, writing: Path, files: Mapping[str, Any]) -> None:
        """Sends this rank's file to the next node, and receives those of the node before."""
        pairs = [
            (file_of(sender), sender, after[number % len(after)])
            for node, after in zip(self._nodes, [*self._nodes[1:], self._nodes[0]], strict=True)
            for number, sender in enumerate(node)
        ]
        outgoing = [(name, receiver) for name, sender, receiver in pairs if sender == self._rank and name in files]
        incoming = [(name, sender) for name, sender, receiver in pairs if receiver == self._rank and name in files]

        def make_room() -> None:
            for name, _ in incoming:
                with (writing / name).open("xb") as file:
                    # Else the kernel would end the process where there is no room behind a mapping.
                    os.posix_fallocate(file.fileno(), 0, files[name]["bytes"])

        def pieces(name: str, *, shared: bool) -> Sequence[Tensor]:
            size = files[name]["bytes"]
            content = torch.from_file(str(writing / name), shared=shared, size=size, dtype=torch.uint8)
            return torch.split(content, _PIECE_BYTES)

        self._agree(failed_together(make_room, self._gather))
        under_way = [
            dist.isend(piece, receiver, group=self.group)
            for name, receiver in outgoing
            for piece in pieces(name, shared=False)
        ]
        for name, sender in incoming:
            for piece in pieces(name, shared=True):
                dist.recv(piece, sender, group=self.group)
        for work in under_way:
            if work is not None:
                work.wait()

    @staticmethod
    def _agree(problem: str | None) -> None:
        if problem is not None:
            raise OSError(problem)

    def _report_failure(self, update: int, error: BaseException) -> None:
        logger.debug("the state of update %d could not be kept in memory", update, exc_info=error)
        if self._rank == 0 and not self._is_failing:
            kept = "there is none" if self.last is None else f"that of update {self.last} stays"
            logger.warning(
                "the state of update %d could not be kept in memory: %s. Training goes on, and the next one is tried; "
                "%s.",
                update,
                reasons(error),
                kept,
            )
        self._is_failing = True


@dataclass(kw_only=True)
class _NodeWriter(ManifestWriter):
    """Writes a state into the memory of each node, without a manifest.

    Attributes:
        nodes: the ranks of each node.
        gather: exchanges values of all ranks.
        keep: update of the state that stays meanwhile; all others make room.
        has_room: there is room for two states, as has been asked already.
        manifest: of the state, once all ranks have written; on rank 0.
        refusal: why there is no room, the same on all ranks.
    """

    nodes: list[list[int]]
    gather: Gather
    keep: int | None
    has_room: bool
    manifest: dict[str, Any] | None = field(default=None, init=False)
    refusal: str | None = field(default=None, init=False)

    @property
    def _number(self) -> int:
        return next(number for number, node in enumerate(self.nodes) if self.rank in node)

    @property
    def is_first_of_node(self) -> bool:
        return self.nodes[self._number][0] == self.rank

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        # All ranks have planned before any of them writes.
        if self.is_first_of_node:
            for path in list(self.folder.iterdir()):
                if self.keep is None or path.name != name_of(self.keep):
                    shutil.rmtree(path)
            start_writing(self.folder, self.update)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        if not self.has_room:
            self._ask_for_room(plan)
        return super().write_data(plan, planner)

    def _ask_for_room(self, plan: SavePlan) -> None:
        """Refuses a node whose memory doesn't hold two states, before anything is written."""
        mine = sum(
            math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize
            for item in plan.items
            if item.tensor_data is not None
        )
        held = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        free = min(shutil.disk_usage(self.folder).free, free_memory(torch.device("cpu"))) + held
        asked = self.gather((mine, free, socket.gethostname()))
        for number, node in enumerate(self.nodes):
            ranks = [*node, *(self.nodes[number - 1] if len(self.nodes) > 1 else ())]
            needed = 2 * sum(asked[rank][0] for rank in ranks)
            _, there, host = asked[node[0]]
            if needed > there:
                self.refusal = (
                    f"checkpoint.memory_every_updates needs {needed / 1e6:,.1f} MB of memory on {host} for two states "
                    f"of the run, and {memory_root()} has room for {there / 1e6:,.1f} MB. Enlarge it (mount -o "
                    f"remount,size=…), name another file system in memory in the environment variable {VARIABLE}, "
                    "or leave the key out."
                )
                raise OSError(self.refusal)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.sync_files()
        self.manifest = self.manifest_of(metadata, results)
