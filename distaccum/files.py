"""Files that survive a kill at any moment, and a disk that is full for a while."""

from __future__ import annotations

import contextlib
import logging
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from distaccum.errors import UserError

logger = logging.getLogger(__name__)


def without_tilde(path: str) -> Path:
    """A path that a user has given, with their home in place of `~`.

    Raises:
        UserError: there is no such home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path} can't be found: {error}. Give the whole path.") from error


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
