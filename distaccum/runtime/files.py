"""Files that stay whole when the process is killed at any moment, or the disk is full for a while."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import platform
import secrets
import stat
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from distaccum.errors import UserError

logger = logging.getLogger(__name__)

WRITING = ".writing"
"""End of the names of files that are not complete; a process that is killed leaves them."""
_LONGEST_BEGINNING = 200
"""Bytes of a file's name that are in the name of what will replace it; file systems allow 255."""
_SECONDS_OF_A_DAY = 86_400
_MOST_BYTES_OF_YAML = 256 << 10


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
def locked(path: Path) -> Iterator[bool]:
    """Waits until no other process holds a lock; yields False where locking fails, as on a file system without locks.

    Args:
        path: a file for the lock, which stays.
    """
    with contextlib.ExitStack() as stack:
        try:
            fcntl.flock(stack.enter_context(path.open("ab")), fcntl.LOCK_EX)
        except OSError as error:
            logger.debug("%s can't be locked: %s", path, error)
            yield False
        else:
            yield True


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that replaces `path` when it is complete and on the disk; until then nothing changes.

    Where `path` is a symbolic link, the link is replaced. Others who can write in the folder can't redirect what is
    written: the file's name until then is random and new. A process that is killed leaves it (`remove_unfinished`).

    Raises:
        OSError: it can't be written, or what is there is neither a file nor a link; nothing is left of it.
    """
    if path.exists() and not path.is_symlink() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a regular file")
    beginning = os.fsencode(path.name)[:_LONGEST_BEGINNING].decode(errors="ignore")
    aside = path.with_name(f".{beginning}.{_host()}-{secrets.token_hex(8)}{WRITING}")
    try:
        with aside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def remove_unfinished(folder: Path, pattern: str) -> None:
    """Removes what processes that were killed have left of files that `replacing` was to write.

    Only what this host has left: whether one of another host is still being written can't be told, unless by a day
    without a change.

    Args:
        pattern: of the files' names. No process of this host may be writing one now.
    """
    for file in folder.glob(f".{pattern}.*{WRITING}"):
        with contextlib.suppress(OSError):  # removed by another process
            is_own = file.name.rpartition("-")[0].endswith(f".{_host()}")
            if is_own or time.time() - file.stat().st_mtime > _SECONDS_OF_A_DAY:
                file.unlink()


@cache
def _host() -> str:
    """Returns a short name of this host, of letters and digits."""
    return hashlib.blake2b(platform.node().encode(), digest_size=4).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes a whole file, as `replacing` does."""
    with replacing(path) as file:
        file.write(text.encode())


def write_result(path: Path, text: str, mend: str) -> None:
    """Writes a whole file that the user has asked for.

    Raises:
        UserError: it can't be written; ends with how to `mend` it.
    """
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}. {mend}") from error


def opened(path: str | Path, flags: int) -> int:
    """Opens a file for appending (an `opener` for `open`), which must not be a symbolic link.

    Raises:
        OSError: it can't be opened.
    """
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def sync(path: Path) -> None:
    """Brings the content of a file, or the list of a folder's files, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path, most_bytes: int = 1 << 62) -> BinaryIO:
    """Opens a file that may come from elsewhere: no link out of its folder, no device, no pipe to wait at for ever.

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
    """Reads the dictionary in a small YAML file that may come from elsewhere; None if there is none."""
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

    If the file is removed, or another takes its place (as when an editor saves it), the next line goes to the file that
    then has the name, behind those that were written before, as far as that file is how they begin; a warning says so.
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
        self._file: FileIO | None = self._open(os.O_EXCL if new else 0)

    def _open(self, more_flags: int = 0) -> FileIO:
        return open(self.path, "ab+", buffering=0, opener=lambda path, flags: opened(path, flags | more_flags))

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
        """Writes what is pending, and closes; returns the error if lines are lost, which `pending` then holds."""
        error = self._write_pending()
        file, self._file = self._file, None
        try:
            if file is not None:
                with file:
                    # Network file systems may report only here, or when it is closed, that there was no room.
                    os.fsync(file.fileno())
        except OSError as failure:
            return failure
        return error

    def _write_pending(self) -> OSError | None:
        num_lines = len(self.pending)
        try:
            file = self._current()
            while self.pending:
                write_whole(file, self.pending[0])
                self.pending.popleft()
        except OSError as error:
            # The next try opens the file anew: on a server that was away, this one may never work again.
            if self._file is not None:
                with contextlib.suppress(OSError):
                    self._file.close()
                self._file = None
            return error
        if self._failing:
            self._failing = False
            logger.info("%s can be written again, and has the %d lines that waited.", self.path, num_lines)
        return None

    def _current(self) -> FileIO:
        """Opens the file that has the name now. Lines that it lacks are pending again, if they are known."""
        before = self._file
        if before is not None:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(before.fileno()), self.path.stat(follow_symlinks=False)):
                    return before
        self._file = after = self._open()
        missing = b"\n" if ends_within_line(after) else b""
        if before is not None:
            with before:
                written, found = _content(before), _content(after)
            is_beginning = written.startswith(found)
            missing = (written[len(found) :] if is_beginning else b"") or missing
            outcome = "has all its lines again" if is_beginning else "may lack lines that were written before"
            logger.warning("%s was replaced or removed while the run writes it, and %s.", self.path, outcome)
        self.pending.extendleft(reversed(missing.splitlines(keepends=True)))
        return after


def write_whole(file: FileIO, line: bytes) -> None:
    """Appends a line; takes back what was written of it if something (a full disk, Ctrl-C) ends this in between."""
    size = os.fstat(file.fileno()).st_size
    rest = memoryview(line)
    try:
        while rest:
            rest = rest[os.write(file.fileno(), rest) :]
    except BaseException:
        with contextlib.suppress(OSError):
            file.truncate(size)
        raise


def ends_within_line(file: FileIO) -> bool:
    """Returns whether the last line has no line break, as when a process was killed while it wrote."""
    size = os.fstat(file.fileno()).st_size
    return size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"


def _content(file: FileIO) -> bytes:
    file.seek(0)
    return file.readall()
