"""Files of tokens, read as one long sequence: raw ones, those of llm.c, and numpy's."""

from __future__ import annotations

import json
import logging
import os
import re
import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from distaccum.data.splits import EVALUATION, TRAIN
from distaccum.data.storage.files import RangeReader, is_remote, list_files, local, open_file, size_and_version
from distaccum.errors import UserError

logger = logging.getLogger("distaccum.data")

INDEX = "index.json"
"""Lists the files of a folder that `python -m distaccum.data.tokenize` has made."""
ENDS = ".ends"
"""Ends the name of the file beside one of tokens that says where its documents end: int64, the number of tokens up to
the end of each."""
ENDINGS = (".bin", ".npy")
_DTYPES = {"uint16": "<u2", "uint32": "<u4"}
_HEADER_BYTES = 1024
_HEADERS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}
"""Of llm.c's files, which modded-nanogpt's are too: 256 int32, the first of which are magic, version, tokens."""
_EVALUATION_WORDS = {"val", "valid", "validation", "eval", "evaluation"}
_OPEN_FILES = 128


@dataclass(frozen=True, slots=True)
class TokenFile:
    """Tokens in one file.

    Attributes:
        dtype: numpy's name of the format of a token.
        offset: bytes before the first one.
        count: tokens.
        version: another text when the file has changed.
    """

    path: str
    dtype: str
    offset: int
    count: int
    version: str

    @property
    def ends(self) -> str:
        """Path of the file that says where documents end, which may not exist."""
        return os.path.splitext(self.path)[0] + ENDS


class Tokens:
    """Reads the tokens of several files as one sequence.

    Files are opened when they are first read from, in each process by itself, and read by position. They aren't mapped
    into memory: pages of a map would count as the process's own, which looks like a leak when samples are drawn at
    random; a file that has become shorter would kill the process in place of a message; and no object store has it.

    Args:
        files: in their order.
    """

    def __init__(self, files: Sequence[TokenFile]) -> None:
        self.files = list(files)
        self.starts = [0, *accumulate(file.count for file in files)]
        """Position of the first token of each file, and the number of all tokens."""
        self._dtypes = [np.dtype(file.dtype) for file in files]
        self._reader = RangeReader(_OPEN_FILES)

    def __len__(self) -> int:
        return self.starts[-1]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Returns the tokens at positions from `start` to `stop - 1`, as they are in their files.

        Raises:
            UserError: a file can't be read, or has become shorter.
        """
        number = bisect_right(self.starts, start) - 1
        if stop <= self.starts[number + 1]:
            return self.part(number, start - self.starts[number], stop - self.starts[number])
        parts = []
        while start < stop:
            number = bisect_right(self.starts, start) - 1
            end = min(stop, self.starts[number + 1])
            parts.append(self.part(number, start - self.starts[number], end - self.starts[number]))
            start = end
        return np.concatenate(parts)

    def part(self, number: int, start: int, stop: int) -> NDArray[Any]:
        """Returns tokens of one file as they are in it; raises as `read`."""
        file, dtype = self.files[number], self._dtypes[number]
        first = file.offset + start * dtype.itemsize
        return np.frombuffer(self._reader.read(file.path, first, first + (stop - start) * dtype.itemsize), dtype)

    def place(self, position: int) -> str:
        """Names the token at a position, for messages."""
        number = bisect_right(self.starts, position) - 1
        return f"{self.files[number].path}, token {position - self.starts[number]}"


@dataclass(slots=True)
class Found:
    """Files that paths and patterns name.

    Attributes:
        files: without those that follow.
        evaluation_files: those of folders that are to evaluate on by their names, as `val.bin` is.
        vocab_size: as indices say; None without one.
    """

    files: list[TokenFile]
    evaluation_files: list[TokenFile]
    vocab_size: int | None


def find(files: str | Sequence[str], key: str, dtype: str) -> Found:
    """Finds files of tokens, and how many each has, without reading them.

    Args:
        files: files, patterns, addresses, indices, and local folders. Those of a folder or a pattern come in the order
            of their names.
        key: configuration key, for messages.
        dtype: of files that don't say theirs: `uint16` or `uint32`.

    Raises:
        UserError: there is none, or one can't be read or has another form.
    """
    if dtype not in _DTYPES:
        raise UserError(f"data.dtype={dtype} is none of {', '.join(_DTYPES)}.")
    found = Found([], [], None)
    for path in list_files(files, key):
        is_folder = not is_remote(path) and os.path.isdir(local(path))
        index = os.path.join(path, INDEX) if is_folder else path
        if os.path.basename(index) == INDEX and (not is_folder or os.path.exists(local(index))):
            some, vocab_size = _of_index(index)
            if found.vocab_size not in (None, vocab_size):
                raise UserError(f"{key}: {path} was made with another tokenizer than the others. Give one of them.")
            found.files += some
            found.vocab_size = vocab_size
        elif is_folder:
            for role, entry in _of_folder(Path(local(path)), key):
                (found.evaluation_files if role == EVALUATION else found.files).append(_file(entry, _DTYPES[dtype]))
        else:
            found.files.append(_file(path, _DTYPES[dtype]))
    return found


def _of_folder(folder: Path, key: str) -> list[tuple[str, str]]:
    """Returns what each file of a folder is for, by its name, as in `val` and `fineweb_train_000001`; and its path."""
    found = []
    for path in sorted(path for path in folder.iterdir() if path.suffix in ENDINGS and not path.name.startswith(".")):
        words = set(re.split("[^a-z]+", path.stem.lower()))
        if "test" in words:
            logger.info("%s: %s is left out, by its name", key, path)
        else:
            found.append((EVALUATION if words & _EVALUATION_WORDS else TRAIN, str(path)))
    if not found:
        raise UserError(f"{key}: the folder {folder} has no files of tokens ({' or '.join(ENDINGS)}).")
    return found


def _of_index(path: str) -> tuple[list[TokenFile], int]:
    """Returns the files that an index lists, and the size of the vocabulary."""
    try:
        with open_file(path) as file:
            index = json.load(file)
        counts = {os.path.basename(entry["file"]): entry["tokens"] for entry in index["files"]}
        is_complete, vocab_size = index["complete"], int(index["vocab_size"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} can't be read as what distaccum.data.tokenize writes: {error!r}.") from error
    if not is_complete:
        raise UserError(f"{path} isn't complete: start the same distaccum.data.tokenize again, and it goes on.")
    files = [_file(os.path.join(os.path.dirname(path), name), _DTYPES["uint16"]) for name in counts]
    for found, count in zip(files, counts.values(), strict=True):
        if found.count != count:
            raise UserError(f"{found.path} has {found.count} tokens, and {path} says {count}. Make the folder anew.")
    return files, vocab_size


def _file(path: str, dtype: str) -> TokenFile:
    """Returns a file with the form that its ending, or its beginning, says.

    Raises:
        UserError: it can't be read, or has none of the forms.
    """
    if not path.endswith(ENDINGS):
        raise UserError(f"{path} is no file of tokens: those end with {' or '.join(ENDINGS)}.")
    size, version = size_and_version(path)
    offset, expected = 0, None
    try:
        with open_file(path) as file:
            if path.endswith(".npy"):
                offset, dtype, expected = _npy_header(file)
            else:
                magic, number, count = struct.unpack("<3i", file.read(12).ljust(12, b"\0"))
                if (magic, number) in _HEADERS:
                    offset, dtype, expected = _HEADER_BYTES, _HEADERS[magic, number], count
    except UserError:
        raise
    except Exception as error:  # of many kinds, as NumPy reads headers as Python
        raise UserError(f"{path} can't be read as tokens: {error}.") from error
    count, rest = divmod(max(0, size - offset), np.dtype(dtype).itemsize)
    if rest or expected not in (None, count):
        said = "a whole number of tokens" if expected is None else f"the {expected} tokens that its header says"
        raise UserError(f"{path} has {size} bytes, which isn't {said} (of {np.dtype(dtype)}). Is it complete?")
    return TokenFile(path, dtype, offset, count, f"{size} {version}")


def _npy_header(file: BinaryIO) -> tuple[int, str, int]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if len(shape) != 1 or dtype.kind != "u" or dtype.itemsize not in (2, 4):
        raise ValueError(
            f"it is an array of {dtype} and of shape {shape}; tokens are uint16 or uint32, of one dimension"
        )
    return file.tell(), dtype.str, shape[0]
