"""Names the places of the newest states of a run, in memory that outlives its processes, on each node:

    /dev/shm/distaccum-<user>-<hash of the run's folder of checkpoints>/<identifier>/update-00000120/

The last of these is a checkpoint like those on the disk. The identifier is drawn when a run begins, and kept in its
folder of checkpoints: what a run has left in the memory of a node that it never came back to is not taken for a
later one's.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distaccum.errors import UserError
from distaccum.runtime.files import open_regular, write_text

Gather = Callable[[Any], list[Any]]
"""Returns every rank's value on every rank; all ranks call it."""

VARIABLE = "DISTACCUM_MEMORY_DIR"
"""Names another file system in memory than /dev/shm, where that is too small (as in containers)."""

_IDENTIFIER_FILE = "memory.id"
_IDENTIFIER = re.compile("[0-9a-f]{32}", re.ASCII)


def memory_root() -> Path:
    """The file system in memory that states of runs are kept in."""
    return Path(os.environ.get(VARIABLE) or "/dev/shm")


@dataclass(frozen=True, slots=True)
class MemoryPlace:
    """The place of a run's states in the memory of any node.

    Attributes:
        name: of the folder of checkpoints, as a hash: the same for all runs that are made in it one after another.
        identifier: of this run. None: it has kept nothing in memory.
    """

    name: str
    identifier: str | None

    @property
    def root(self) -> Path:
        """The folder of whatever runs in that folder of checkpoints have in this node's memory."""
        return memory_root() / f"distaccum-{os.getuid()}-{self.name}"

    @property
    def folder(self) -> Path:
        """The folder of the run's own states on this node."""
        return self.root / (self.identifier or "none")

    def is_own(self) -> bool:
        """Whether the folder is there, and no other user can have put anything into it: the root is everybody's."""
        with suppress(OSError):
            status = self.root.lstat()
            return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
        return False

    def make(self) -> None:
        """Makes the folder.

        Raises:
            OSError: it can't be made, is another user's, or is not in memory.
        """
        # On a disk that nodes share, each would take the folder for its own and remove the states of the others.
        if (kind := _file_system(memory_root())) != "tmpfs":
            raise OSError(f"it is on {kind}, not on tmpfs")
        self.root.mkdir(mode=0o700, exist_ok=True)
        if not self.is_own():
            raise PermissionError(f"{self.root} is there, and not this user's alone")
        self.folder.mkdir(exist_ok=True)

    def clear_others(self) -> None:
        """Removes what other runs have left here. All ranks of a node may call it at once."""
        if not self.is_own():
            return
        if self.identifier is None:
            shutil.rmtree(self.root, ignore_errors=True)
            return
        with suppress(OSError):
            for path in list(self.root.iterdir()):
                if path.name != self.identifier:
                    shutil.rmtree(path, ignore_errors=True)


def memory_place(checkpoints: Path, *, rank: int, gather: Gather, draw: bool = False) -> MemoryPlace:
    """Returns the place of a run's states, the same on all ranks.

    Args:
        checkpoints: its folder of checkpoints, as rank 0 sees it.
        draw: give the run an identifier, if it has none.

    Raises:
        UserError: the identifier can't be written.
    """
    found: MemoryPlace | str | None = None
    if rank == 0:
        name = hashlib.blake2b(os.fsencode(checkpoints.resolve()), digest_size=8).hexdigest()
        try:
            found = MemoryPlace(name, _identifier(checkpoints, draw=draw))
        except OSError as error:
            found = f"{checkpoints / _IDENTIFIER_FILE} can't be written: {error.strerror or error}."
    place = gather(found)[0]
    if isinstance(place, str):
        raise UserError(place)
    assert isinstance(place, MemoryPlace)
    return place


def _identifier(checkpoints: Path, *, draw: bool) -> str | None:
    path = checkpoints / _IDENTIFIER_FILE
    with suppress(OSError, UnicodeDecodeError), open_regular(path, 64) as file:
        text = file.read().decode().strip()
        if _IDENTIFIER.fullmatch(text):
            return text
    if not draw:
        return None
    checkpoints.mkdir(parents=True, exist_ok=True)
    identifier = secrets.token_hex(16)
    write_text(path, f"{identifier}\n")
    return identifier


def has_memory(checkpoints: Path) -> bool:
    """Returns whether a run in a folder of checkpoints has kept states in memory, which may be gone by now."""
    return _identifier(checkpoints, draw=False) is not None


def forget_memory(checkpoints: Path) -> None:
    """Makes all that runs in a folder of checkpoints have left in memory count no more. To be called on rank 0.

    Raises:
        OSError: the folder can't be written.
    """
    (checkpoints / _IDENTIFIER_FILE).unlink(missing_ok=True)


def nodes_of(gather: Gather) -> list[list[int]]:
    """Returns the ranks of each node, both in the order of ranks; a node is where ranks share the memory's root."""
    nodes: dict[Any, list[int]] = {}
    for rank, node in enumerate(gather(_this_node())):
        nodes.setdefault(node, []).append(rank)
    return list(nodes.values())


def _this_node() -> tuple[str, int, int]:
    with suppress(OSError):
        status = memory_root().stat()
        # Numbers of file systems count on one kernel; on the same one, each container may have memory of its own.
        return Path("/proc/sys/kernel/random/boot_id").read_text(), status.st_dev, status.st_ino
    return "", 0, 0


def _file_system(path: Path) -> str:
    """Returns the kind of file system that a path lies on, as the kernel calls it."""
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        mount, _, file_system = line.partition(" - ")
        if mount.split(" ")[2] == number:
            return file_system.split(" ")[0]
    return "an unknown file system"


def failed_together(step: Callable[[], None], gather: Gather) -> str | None:
    """Takes a step with files on all ranks; returns what went wrong on the first rank where something did."""
    problem = None
    try:
        step()
    except OSError as error:
        problem = (error.strerror or str(error)) + (f" ({error.filename})" if error.filename else "")
    return next((entry for entry in gather(problem) if entry is not None), None)
