"""Finds the samples of tar files by an index: one file that is made once and mapped into memory."""

from __future__ import annotations

import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from distaccum.data.storage.files import is_remote, open_file
from distaccum.data.storage.made_once import damaged, made_once
from distaccum.data.storage.object_stores import shown
from distaccum.data.tars.tar_members import members_of
from distaccum.errors import UserError, listed, require
from distaccum.runtime.logs import console

_FORM = 1
"""Of the index: another number for another layout."""
_MOST_KINDS = 60
"""Different extensions; they are bits of a number, and more of them are a sign of dots in the names of samples."""
_MOST_DIGITS = 19
LABEL = "cls"
"""Extension of the members that hold a class as an integer, which the index keeps."""
NO_LABEL = -1


def key_and_extension(name: str) -> tuple[str, str]:
    """Returns what is before the first dot of a file's name, with its folder, and what is after it in small letters."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return f"{folder}{slash}{key}", extension.lower()


class TarIndex:
    """The samples of tar files, by number: those of the first file in their order, then those of the next.

    Can be pickled and forked. The file is mapped into memory, and may be removed then.

    Args:
        path: the file that `tar_index` has made.
        shards: the tar files.

    Attributes:
        shards: as given.
        extensions: of all members, sorted.
        kinds: which extensions samples have: sets of them as bits, each with how many samples have it, and which is
            the first.
        num_classes: the largest label and one more; 0 if there are no labels.
        bad_label: which member of this extension holds no class, if there is one.
    """

    def __init__(self, path: Path, shards: Sequence[str]) -> None:
        self._path, self.shards = path, shards
        try:
            self._read(path)
        except Exception as error:  # of whatever kind what is in it can lead to
            raise damaged(path) from error

    def _read(self, path: Path) -> None:
        with path.open("rb") as file:
            file.seek(-8, os.SEEK_END)
            length = int.from_bytes(file.read(8), "little")
            file.seek(-8 - length, os.SEEK_END)
            known = json.loads(file.read(length))
        self.extensions: list[str] = known["extensions"]
        self.kinds: list[tuple[int, int, int]] = [(kind[0], kind[1], kind[2]) for kind in known["kinds"]]
        self.num_classes: int = known["num_classes"]
        self.bad_label: str = known["bad_label"]
        self._ends: list[int] = known["ends"]
        self._rows: NDArray[Any] = np.load(path, mmap_mode="r")
        width = len(self.extensions)
        is_whole = len(self._ends) == len(self.shards) and len(self._rows) == self._ends[-1]
        if not is_whole or any(self._rows[name].shape[1:] != (width,) for name in ("offset", "size")):
            raise ValueError

    def __reduce__(self) -> Any:
        return type(self), (self._path, self.shards)

    def __len__(self) -> int:
        return self._ends[-1]

    def shard_of(self, sample: int) -> str:
        """Returns the tar file that a sample is in."""
        return self.shards[bisect_right(self._ends, sample)]

    def row(self, sample: int) -> Any:
        """Returns a sample's `offset` and `size` of each extension, int64 `[extensions]`, and its `label`.

        An offset of 0 stands for a member that it doesn't have.
        """
        return self._rows[sample]


def tar_index(shards: Sequence[str]) -> TarIndex:
    """Returns the index of tar files, after making it if it isn't there or one of them has changed.

    Raises:
        UserError: one of them can't be read, or its members are no samples; names them all.
    """
    return TarIndex(made_once(shards, "tar-index", lambda file: _write(file, shards), depends_on=_FORM), shards)


class _Shard(NamedTuple):
    """The members of a tar file, and how many each of its samples has."""

    extensions: list[str]
    kinds: array[int]
    offsets: array[int]
    sizes: array[int]
    counts: array[int]
    labels: array[int]
    bad_label: str


def _write(file: BinaryIO, shards: Sequence[str]) -> str:
    found = _scanned(shards)
    extensions = sorted({extension for shard in found for extension in shard.extensions})
    if len(extensions) > _MOST_KINDS:
        raise UserError(
            f"the members of {shown(shards[0])} and others have {len(extensions)} different extensions, as "
            f"{listed(extensions, 4)}. What is before the first dot of a name is its sample's key, what comes after it "
            "the extension: take other dots out of the names."
        )
    ends = np.cumsum([len(shard.counts) for shard in found])
    require(ends[-1] > 0, f"there are no samples in {listed([shown(shard) for shard in shards], 3)}.")
    row = [("offset", "<i8", (len(extensions),)), ("size", "<i8", (len(extensions),)), ("label", "<i8")]
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(row)), "fortran_order": False, "shape": (int(ends[-1]),)}
    np.lib.format.write_array_header_2_0(file, header)
    kinds: dict[int, tuple[int, int]] = {}
    first = 0
    for shard in found:
        rows = np.zeros(len(shard.counts), dtype=row)
        places = np.repeat(np.arange(len(rows)), shard.counts)
        columns = np.array([extensions.index(name) for name in shard.extensions], dtype=np.int64)[shard.kinds]
        rows["offset"][places, columns], rows["size"][places, columns] = shard.offsets, shard.sizes
        rows["label"] = shard.labels
        file.write(rows.tobytes())
        sets = (rows["offset"] > 0) @ (1 << np.arange(len(extensions)))
        for kind, at, count in zip(*np.unique(sets, return_index=True, return_counts=True), strict=True):
            before, start = kinds.get(int(kind), (0, first + int(at)))
            kinds[int(kind)] = before + int(count), start
        first += len(rows)
    known = {
        "extensions": extensions,
        "ends": ends.tolist(),
        "kinds": [(kind, *counted) for kind, counted in kinds.items()],
        "num_classes": 1 + max((max(shard.labels, default=NO_LABEL) for shard in found), default=NO_LABEL),
        "bad_label": next((shard.bad_label for shard in found if shard.bad_label), ""),
    }
    text = json.dumps(known).encode()
    file.write(text + len(text).to_bytes(8, "little"))
    return f"{ends[-1]:,} samples of {', '.join(extensions)} in {len(shards):,} files"


def _scanned(shards: Sequence[str]) -> list[_Shard]:
    found: list[_Shard] = []
    failures: list[str] = []
    # Threads are for waiting, at a store or a network's disk: Python reads headers in one at a time.
    threads = 32 if any(map(is_remote, shards)) else 4
    with ThreadPoolExecutor(threads) as pool:
        scans = track(pool.map(_scan, shards), "reading tar files", len(shards), console=console, transient=True)
        for scan in scans:
            if isinstance(scan, str):
                failures.append(scan)
            else:
                found.append(scan)
    if failures:
        raise UserError(f"{len(failures)} of {len(shards)} tar files can't be used: {listed(failures, 5)}")
    return found


def _scan(path: str) -> _Shard | str:
    """Returns what is in a tar file, or why it can't be used."""
    try:
        with open_file(path) as file:
            return _members(file, path)
    except UserError as error:
        return str(error)


def _members(file: BinaryIO, path: str) -> _Shard:
    shard = _Shard([], array("q"), array("q"), array("q"), array("q"), array("q"), "")
    numbers: dict[str, int] = {}
    keys, current, bad_label = set[str](), None, ""
    for name, offset, size in members_of(file, shown(path)):
        key, extension = key_and_extension(name)
        if name.rpartition("/")[2].startswith("."):
            continue  # of systems and editors, as ._1.jpg
        if not extension:
            raise UserError(f"{shown(path)}: {name} belongs to no sample, as it has no extension. Leave it out.")
        if key != current:
            if key in keys:
                raise UserError(
                    f"{shown(path)}: members of the sample {key} are in several places, as {name}. The members of a "
                    "sample must stand together (tar --sort=name), and its key must be its own."
                )
            keys.add(key)
            current = key
            shard.counts.append(0)
            shard.labels.append(NO_LABEL)
        number = numbers.setdefault(extension, len(numbers))
        if number in shard.kinds[len(shard.kinds) - shard.counts[-1] :]:
            raise UserError(f"{shown(path)}: {name} is there twice.")
        if extension == LABEL:
            shard.labels[-1] = _label(file, offset, size)
            if shard.labels[-1] == NO_LABEL:
                bad_label = bad_label or f"{name} in {shown(path)}"
        shard.kinds.append(number)
        shard.offsets.append(offset)
        shard.sizes.append(size)
        shard.counts[-1] += 1
    return shard._replace(extensions=list(numbers), bad_label=bad_label)


def _label(file: BinaryIO, offset: int, size: int) -> int:
    """Returns the class that a member holds, `NO_LABEL` if it holds none."""
    file.seek(offset)
    text = file.read(min(size, 64)).strip()
    return int(text) if text.isdigit() and len(text) < _MOST_DIGITS and size <= 64 else NO_LABEL
