"""Files that are made of others once, and used by all later starts: indexes, decoded copies, tokens."""

from __future__ import annotations

import glob
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from numpy.typing import NDArray

from distaccum.data.storage.files import is_remote, local, size_and_version
from distaccum.data.storage.object_stores import shown
from distaccum.errors import UserError, listed, require
from distaccum.runtime.cache import cache_folder, fingerprint
from distaccum.runtime.files import locked, remove_unfinished, replacing

logger = logging.getLogger("distaccum.data")

FOLDER = ".distaccum"
"""Name of the folder beside the data, for what is made of it."""
_LONGEST_NAME = 80
"""Bytes."""


def made_once(sources: Sequence[str], kind: str, make: Callable[[BinaryIO], str], *, depends_on: Any = None) -> Path:
    """Returns the path of a file that is made of others, after making it if it isn't there or they have changed.

    It is kept in a folder `.distaccum` beside the first of them, or in the cache folder where that can't be written
    (see `distaccum.runtime.cache`). Of all processes that want the same file one makes it, and the others wait, as far
    as the file system knows locks; where it doesn't, each makes it and all are the same.

    Args:
        sources: paths, those of folders for all files in them, and addresses. Whether they have changed is told by
            their sizes and times of change.
        kind: the end of the file's name, which says what it holds.
        make: writes the file, and returns what the log is to say of it.
        depends_on: all else that its content depends on, as JSON values.

    Raises:
        UserError: a source can't be read, or the file can't be written anywhere.
    """
    # A store answers many at a time.
    with ThreadPoolExecutor(32 if any(map(is_remote, sources)) else 1) as pool:
        versions = list(pool.map(lambda source: list(_version(source)), sources))
    # Names from the first one's folder on, so that what is moved together stays known.
    first = os.path.dirname(local(sources[0])) or "."
    names = [source if is_remote(source) else os.path.relpath(local(source), first) for source in sources]
    own = fingerprint([kind, names, depends_on])
    name = os.path.basename(local(sources[0]).rstrip("/"))
    # What follows in an address may be a signature, which is secret.
    name = name.partition("?")[0] if is_remote(sources[0]) else name
    name = os.fsencode(name)[-_LONGEST_NAME:].decode(errors="ignore")
    where = sources[0] if is_remote(sources[0]) else os.path.abspath(local(sources[0]))
    folders = [cache_folder() / fingerprint(where)]
    if not is_remote(sources[0]):
        folders.insert(0, Path(local(sources[0])).absolute().parent / FOLDER)
    file_name = f"{name}.{own}.{fingerprint(versions)}.{kind}"
    of_all_versions = f"{glob.escape(name)}.{own}.*.{kind}"
    lock_name = f".{name}.{own}.{kind}.lock"
    if (found := next((folder for folder in folders if os.path.isfile(folder / file_name)), None)) is not None:
        return found / file_name
    failures: list[str] = []
    for folder in folders:
        path = folder / file_name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / lock_name) as is_alone:
                if not os.path.isfile(path):
                    if is_alone:
                        remove_unfinished(folder, of_all_versions)
                    _make(path, f"{kind} of {shown(listed(sources, 3))}", make)
                    for outdated in folder.glob(of_all_versions):
                        if outdated != path:
                            outdated.unlink(missing_ok=True)
            return path
        except OSError as error:
            failures.append(f"{folder}: {error.strerror or error}")
    raise UserError(
        f"the {kind} of {shown(sources[0])} can't be written ({'; '.join(failures)}). Make room, or one of them "
        "writable, or set XDG_CACHE_HOME to a folder that is."
    )


def _make(path: Path, what: str, make: Callable[[BinaryIO], str]) -> None:
    started = time.monotonic()
    logger.info("making the %s", what)
    with replacing(path) as file:
        said = make(file)
    logger.info("made the %s: %s; %.1f s, kept in %s", what, said, time.monotonic() - started, path)


def _version(source: str) -> Iterator[Any]:
    if is_remote(source) or not os.path.isdir(local(source)):
        found = size_and_version(source)
        require(
            is_remote(source) or os.path.isfile(local(source)),
            f"{source} is no regular file, and can't be read by an index. Write what it gives into a file.",
        )
        yield list(found)
        return
    for folder, names, files in os.walk(local(source)):
        names.sort()
        for name in sorted(files):
            yield [name, *size_and_version(os.path.join(folder, name))]


def damaged(path: Path) -> UserError:
    """Returns the error of a file of `made_once` that doesn't hold what was written into it."""
    return UserError(f"{path} is not as it was written. It is made of other files: remove it, and it is made anew.")


class Mapped:
    """A file as an array in memory, which stays when the file is removed; pickled by the file's path.

    Attributes:
        array: int64 numbers `[size of the file / 8]`, or others by `dtype`.

    Raises:
        UserError: it is no file of such numbers.
    """

    def __init__(self, path: Path, dtype: torch.dtype = torch.int64) -> None:
        self._place = path, dtype
        size = path.stat().st_size
        if not path.is_file() or size % dtype.itemsize or not size:
            raise damaged(path)
        # A map of NumPy's would keep the file open, and there may be more files than a process may have open.
        mapped = torch.from_file(str(path), size=size // dtype.itemsize, dtype=dtype)
        self.array: NDArray[Any] = mapped.numpy()

    def __reduce__(self) -> Any:
        return type(self), self._place
