"""Reads files, local or in an object store.

A path with `://` in it (`s3://`, `gs://`, `hf://`, `https://`, `memory://`, …) is an address of fsspec, which is
imported when the first one is used. Any other path, and `file://`, is opened by the system.

Nothing here belongs to the process that has made it: each request asks fsspec for the file system of the current
process, so that ranks and workers may be forked at any time, with files open.
"""

from __future__ import annotations

import errno
import glob
import io
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from distaccum.data.storage.object_stores import asked, file_system, read_object, shown, timed
from distaccum.errors import UserError, require

_FIRST_BLOCK, _LARGEST_BLOCK = 128 << 10, 4 << 20
_MOST_NAMES = 1_000_000
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
# In the order in which they tell best whether an object is the same; each store has some of them.
_VERSIONS = (
    *("ETag", "etag", "generation", "blob_id", "md5Hash"),
    *("LastModified", "Last-Modified", "last_modified", "updated", "mtime", "modified", "created"),
)


def is_remote(path: str) -> bool:
    """Returns whether a path is an address of fsspec."""
    return "://" in path and not path.startswith("file://")


def open_file(path: str) -> BinaryIO:
    """Opens a file to read its bytes; it can seek.

    A remote one is read in blocks. While it is read forwards, the next block is fetched in a thread.

    Raises:
        UserError: it isn't there, or can't be read; then also from its methods.
    """
    if is_remote(path):
        return io.BufferedReader(_RemoteFile(path))
    try:
        return io.BufferedReader(_LocalFile(local(path)))
    except OSError as error:
        raise _unreadable(path, error) from error


class _LocalFile(io.FileIO):
    """A file whose errors aren't taken for those of what is written meanwhile."""

    def readinto(self, buffer: Any) -> int | None:
        try:
            return super().readinto(buffer)
        except OSError as error:
            raise _unreadable(str(self.name), error) from error

    def readall(self) -> bytes:
        try:
            return super().readall()
        except OSError as error:
            raise _unreadable(str(self.name), error) from error


def read_range(path: str, start: int, stop: int) -> bytes:
    """Returns the bytes `[start, stop)` of a file. To read from the same local files again and again: `RangeReader`.

    Raises:
        UserError: it can't be read, or ends before `stop`.
    """
    return RangeReader(most_open=1).read(path, start, stop)


def size_and_version(path: str) -> tuple[int, str]:
    """Returns a file's size in bytes, and a text that is another one when it has changed: the time of its change in
    nanoseconds, or what the store has (ETag, generation, time); empty, if the store has nothing.

    Raises:
        UserError: it isn't there, or its size is not known.
    """
    if not is_remote(path):
        try:
            status = os.stat(local(path))
        except OSError as error:
            raise _unreadable(path, error) from error
        return status.st_size, str(status.st_mtime_ns)
    info: dict[str, Any] = asked(path, lambda system, name: system.info(name, **timed(system)))
    require(info.get("type") != "directory", f"{shown(path)} is a folder, not a file.")
    if not isinstance(info.get("size"), int):
        raise UserError(f"{shown(path)}: its server doesn't say its size. Copy it elsewhere.")
    return info["size"], next((str(info[key]) for key in _VERSIONS if info.get(key)), "")


def list_files(patterns: str | Sequence[str], key: str) -> list[str]:
    """Returns the paths that patterns name, in their order; those of one pattern sorted.

    A pattern may hold `*`, `?`, `[…]`, `**` (any depth), `{a,b}` and `{000..099}`. A remote address without any of
    these but the last two is returned without asking whether it is there. In `http(s)://` a `?` stands for itself, and
    `*` needs a page that lists the folder's files as links.

    Args:
        key: the configuration key, for messages.

    Raises:
        UserError: one names nothing.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise UserError(f"{key}={patterns!r} is neither a path nor a list of paths.")
    if not patterns:
        raise UserError(f"{key}=[] names no file. Give at least one.")
    found: list[str] = []
    for pattern in patterns:
        names = [pattern] if not is_remote(pattern) and _exists(pattern) else _without_braces(pattern)
        for name in names:
            matches = _matches(name)
            if not matches:
                where = "" if is_remote(name) else f" in {Path.cwd()}"
                raise UserError(f"{key}: there is no file {shown(name)}{where}. Give a path or a pattern.")
            found += matches
    return found


def files_of_splits(
    files: str | Sequence[str], evaluation_files: str | Sequence[str] | None, name: str = "files"
) -> dict[str, list[str]]:
    """Returns the files to train on and, if they are given, those to evaluate on, by their configuration keys.

    Raises:
        UserError: a pattern names nothing, or a file is named twice.
    """
    found = {f"data.{name}": list_files(files, f"data.{name}")}
    if evaluation_files is not None:
        found[f"data.evaluation_{name}"] = list_files(evaluation_files, f"data.evaluation_{name}")
    require_named_once(found)
    return found


def require_named_once(files: Mapping[str, Sequence[str]]) -> None:
    """Refuses files that are named twice: their samples would count twice, or be trained on and evaluated.

    Args:
        files: paths or addresses by their configuration keys.

    Raises:
        UserError: names the file and its keys.
    """
    seen: dict[str, str] = {}
    for key, paths in files.items():
        for path in paths:
            real = path if is_remote(path) else os.path.realpath(local(path))
            if real in seen:
                raise UserError(f"{key}: {shown(path)} is named twice, also in {seen[real]}. Name each file once.")
            seen[real] = key


def _matches(name: str) -> list[str]:
    if not is_remote(name):
        return [local(name)] if _exists(name) else _local_matches(local(name))
    if not re.search(r"[*\[]" if name.startswith("http") else r"[*?\[]", name):
        return [name]
    if "::" in name:
        raise UserError(f"{shown(name)}: patterns in chained addresses (::) are not supported. Name each object.")
    names = asked(name, lambda system, place: system.glob(place, **timed(system)))
    system, _ = file_system(name)
    return sorted(system.unstrip_protocol(found) for found in names)


def _exists(path: str) -> bool:
    try:
        os.stat(local(path))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # of a pattern
            return False
        raise _unreadable(path, error) from error
    return True


def _local_matches(pattern: str) -> list[str]:
    """Returns the files of a pattern; refuses folders that can't be searched, which `glob` takes for empty."""
    above = Path(pattern)
    while above != above.parent:
        part, above = above.name, above.parent
        for folder in glob.glob(f"{above}/", recursive=True) if glob.has_magic(part) else ():
            if not os.access(folder, os.R_OK | os.X_OK):
                raise UserError(f"{folder} can't be searched for {pattern}: permission denied. Name other folders.")
    return sorted(glob.glob(pattern, recursive=True))


def _without_braces(pattern: str) -> Iterator[str]:
    """Yields the names that `{a,b}` and `{000..099}` stand for, as a shell does."""
    braces = _BRACES.search(pattern)
    if braces is None:
        yield pattern
        return
    if braces[3] is not None:
        parts = braces[3].split(",")
    else:
        first, last = int(braces[1]), int(braces[2])
        require(first <= last, f"{pattern}: {braces[0]} names nothing, as {first} is greater than {last}.")
        require(last - first < _MOST_NAMES, f"{pattern}: {braces[0]} names more than {_MOST_NAMES:,} files.")
        width = len(braces[1]) if braces[1].startswith("0") else 0
        parts = [f"{number:0{width}d}" for number in range(first, last + 1)]
    for part in parts:
        yield from _without_braces(pattern[: braces.start()] + part + pattern[braces.end() :])


class RangeReader:
    """Reads parts of files, of which the local ones stay open, the last used `most_open` of them.

    Can be used by several threads, forked and pickled.
    """

    def __init__(self, most_open: int = 32) -> None:
        self._most_open = most_open
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        return type(self), (self._most_open,)

    def read(self, path: str, start: int, stop: int) -> bytes:
        """Returns the bytes `[start, stop)`.

        Raises:
            UserError: the file can't be read, or ends before `stop`.
        """
        if is_remote(path):
            return read_object(path, start, stop)
        try:
            found = self._descriptor(path).read(start, stop)
        except OSError as error:
            raise _unreadable(path, error) from error
        if len(found) < stop - start:
            raise UserError(f"{path} ends at byte {start + len(found)}, before byte {stop}: it is not whole any more.")
        return found

    def _descriptor(self, path: str) -> _Descriptor:
        with self._lock:
            found = self._open.get(path)
            if found is None:
                found = self._open[path] = _Descriptor(local(path))
                if len(self._open) > self._most_open:
                    self._open.popitem(last=False)
            self._open.move_to_end(path)
            return found


class _Descriptor:
    """Holds an open local file, which is closed when nobody reads from it any more."""

    def __init__(self, path: str) -> None:
        self._number = -1
        self._number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self._number >= 0:
            os.close(self._number)

    def read(self, start: int, stop: int) -> bytes:
        """Reads without moving a position, which processes that were forked would share."""
        parts = []
        stop = min(stop, os.fstat(self._number).st_size)  # a wrong index may ask for more than there is memory
        while start < stop and (part := os.pread(self._number, stop - start, start)):  # at most 2 GiB come at once
            parts.append(part)
            start += len(part)
        return b"".join(parts)


class _RemoteFile(io.RawIOBase):
    """Reads an object in blocks: small ones wherever it is asked for, larger ones the longer it is read forwards."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._size, _ = size_and_version(path)
        self._position = 0
        self._start, self._block, self._length = 0, b"", _FIRST_BLOCK
        self._ahead: _Ahead | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        require(base + offset >= 0, f"{shown(self._path)}: there is no position {base + offset}.")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._size:
            return 0
        if not self._start <= self._position < self._start + len(self._block):
            self._load()
        within = self._position - self._start
        part = memoryview(self._block)[within : within + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def _load(self) -> None:
        start, ahead, self._ahead = self._position, self._ahead, None
        goes_on = len(self._block) > 0 and start == self._start + len(self._block)
        self._length = min(2 * self._length, _LARGEST_BLOCK) if goes_on else _FIRST_BLOCK
        if ahead is not None and ahead.is_for(start):
            self._block = ahead.result()
        else:
            self._block = read_object(self._path, start, min(start + self._length, self._size))
        self._start = start
        end = start + len(self._block)
        if goes_on and end < self._size:
            self._ahead = _Ahead(self._path, end, min(end + self._length, self._size))


class _Ahead:
    """Reads a block in a thread of its own."""

    def __init__(self, path: str, start: int, stop: int) -> None:
        self._start, self._process = start, os.getpid()
        self._found: bytes | Exception = b""
        self._thread = threading.Thread(target=self._read, args=(path, start, stop), daemon=True)
        self._thread.start()

    def is_for(self, start: int) -> bool:
        """Returns whether it is the block that begins there, and the thread is one of this process."""
        return start == self._start and self._process == os.getpid()

    def result(self) -> bytes:
        self._thread.join()
        if isinstance(self._found, Exception):
            raise self._found
        return self._found

    def _read(self, path: str, start: int, stop: int) -> None:
        try:
            self._found = read_object(path, start, stop)
        except Exception as error:
            self._found = error


def local(path: str) -> str:
    """Returns a local path, without `file://`, and with the user's home in place of `~`."""
    return os.path.expanduser(path.removeprefix("file://"))


def _unreadable(path: str, error: OSError) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"there is no file {path} (looked for {os.path.abspath(local(path))}).")
    return UserError(f"{path} can't be read: {error.strerror or error}.")
