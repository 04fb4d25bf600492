"""Files that survive a kill at any moment, and a disk that is full for a while."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import stat
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import yaml

logger = logging.getLogger(__name__)

_MOST_BYTES_OF_YAML = 256 << 10


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` when it is complete and on the disk; until then nothing changes.

    Raises:
        OSError: it can't be written; nothing is left of it.
    """
    aside = path.with_name(f".{path.name}.writing")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Sees to it that what a file holds, or which files a folder holds, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path, most_bytes: int = 1 << 62) -> BinaryIO:
    """Opens a file to read that may be a stranger's: no link out of its folder, no device, no pipe to wait at for ever.

    Raises:
        OSError: it is one of those, or larger than `most_bytes`, or can't be read.
    """
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    if status.st_size > most_bytes:
        raise OSError(errno.EFBIG, f"it is larger than {most_bytes} bytes", str(path))
    return path.open("rb")


class _PlainLoader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads no aliases, a few lines of which can stand for more than there is memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases")
        return super().compose_node(parent, index)


def read_plain_yaml(path: Path) -> dict[str, Any] | None:
    """The dictionary in a small YAML file that may be a stranger's; None if there is none that can be read."""
    try:
        with open_regular(path, _MOST_BYTES_OF_YAML) as file:
            found = yaml.load(file, _PlainLoader)
        json.dumps(found, default=str)  # no number that can't be shown, nothing that is too deep
    except Exception:  # whatever a wrong tag makes of a wrong value
        return None
    return found if isinstance(found, dict) else None


class LineFile:
    """Appends lines to a file, each handed to the operating system at once and as a whole.

    A line that can't be written (the disk is full, a quota is used up, a server is gone) stays in memory, and so do
    those after it: all are tried again with each next line. A warning says so once, and a message when they have been
    written. What there was room for of such a line is taken back, so that the file ends with a whole line.
    """

    def __init__(self, path: Path, *, new: bool) -> None:
        """Opens the file; `new` makes it.

        Raises:
            OSError: it can't be opened; `FileExistsError` if it is to be new and is not.
        """
        self.path = path
        self.pending: deque[bytes] = deque()
        """Lines that are not in the file yet, the oldest first."""
        self._failing = False
        self._torn = False
        flags = os.O_CREAT | os.O_EXCL if new else 0
        self._descriptor: int | None = self._open(flags)
        self._size = os.fstat(self._descriptor).st_size

    def _open(self, flags: int = 0) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | flags, 0o666)

    def append(self, line: str) -> None:
        """Writes a line, now or when it can be written."""
        self.pending.append(f"{line}\n".encode())
        error = self._write_pending()
        if error is not None and not self._failing:
            self._failing = True
            logger.warning(
                "%s can't be written: %s. The run goes on; lines wait in memory until they can be written.",
                self.path,
                error.strerror or error,
            )

    def close(self) -> OSError | None:
        """Writes what is pending, and closes; returns what has kept lines from the disk, if anything has.

        Then `pending` holds those that are known to be lost.
        """
        error = self._write_pending()
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return error
        try:
            # Network file systems may report only here that there was no room.
            os.fsync(descriptor)
        except OSError as failure:
            error = failure
        try:
            os.close(descriptor)
        except OSError as failure:
            error = error or failure
        return error

    def _write_pending(self) -> OSError | None:
        num_lines = len(self.pending)
        try:
            if self._descriptor is None:
                self._descriptor = self._open()
            while self.pending:
                self._write(self._descriptor, self.pending[0])
                self.pending.popleft()
        except OSError as error:
            # The next try opens the file anew: on a server that was away, this descriptor may never work again.
            descriptor, self._descriptor = self._descriptor, None
            if descriptor is not None:
                with contextlib.suppress(OSError):
                    self._take_back(descriptor)
                with contextlib.suppress(OSError):
                    os.close(descriptor)
            return error
        if self._failing:
            self._failing = False
            logger.info("%s can be written again, and has the %d lines that waited.", self.path, num_lines)
        return None

    def _write(self, descriptor: int, line: bytes) -> None:
        self._take_back(descriptor)
        self._torn = True  # until it is whole, also if something (Ctrl-C) ends this in between
        rest = memoryview(line)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        self._size += len(line)
        self._torn = False

    def _take_back(self, descriptor: int) -> None:
        """Cuts off the beginning of a line that could not be written to its end."""
        if self._torn:
            size = os.fstat(descriptor).st_size
            if size > self._size:
                os.ftruncate(descriptor, self._size)
            self._torn = False
