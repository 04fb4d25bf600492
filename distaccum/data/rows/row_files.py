"""Reads rows of one file by their numbers: JSON lines, Parquet, and datasets of Hugging Face."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from distaccum.data.rows.tables import BYTE_ORDER_MARK, Row, imported, parsed_line
from distaccum.data.storage.files import RangeReader, is_remote, local, open_file
from distaccum.data.storage.made_once import Mapped, damaged, made_once
from distaccum.data.storage.object_stores import shown
from distaccum.errors import UserError, listed

_BLOCK = 16 << 20
_BLANKS = np.frombuffer(b" \t\r\n", np.uint8)
_ROWS_OF_BATCH = 1024
"""Rows of a record batch in a decoded copy: one is looked up at once, without reading the others."""
MOST_DECODED = 256 << 20
"""Bytes of decoded row groups that a process keeps, of all files."""
MOST_OPEN = 32
"""Parquet files that a process keeps open."""


class RowFile(Protocol):
    """Rows that are read by their numbers. Can be pickled, and used after a fork.

    Attributes:
        path: names it in messages.
        sources: paths or addresses of the files that tell by their sizes and times whether rows have changed.
    """

    path: str
    sources: list[str]

    def __len__(self) -> int: ...

    def rows(self, numbers: Sequence[int]) -> list[Row]:
        """Returns rows, in the order of their numbers given, each a dictionary of columns."""
        ...


class JsonLines:
    """Reads rows of a file of JSON lines by an index of where they begin, which is made once. Blank lines don't count.

    Args:
        path: path or address of the file.
        columns: that its first row must have.
        reader: opens the files; those of a dataset share it.

    Raises:
        UserError: it can't be read, its first row is no object, or lacks a column.
    """

    def __init__(self, path: str, columns: Sequence[str] | None, reader: RangeReader) -> None:
        self.path, self.sources = path, [path]
        self._reader = reader
        self._index = made_once([path], "row-index", partial(_write_starts, path))
        self._starts = Mapped(self._index)
        if len(self):
            first = self.rows([0])[0]
            if missing := [name for name in columns or () if name not in first]:
                raise UserError(
                    f"data.columns: {shown(path)} has no column {missing[0]}. It has {listed(sorted(first), 12)}."
                )

    def __len__(self) -> int:
        return len(self._starts.array) - 1

    def rows(self, numbers: Sequence[int]) -> list[Row]:
        starts = self._starts.array
        return [self._parsed(number, int(starts[number]), int(starts[number + 1])) for number in numbers]

    def _parsed(self, number: int, start: int, stop: int) -> Row:
        if not 0 <= start < stop:
            raise damaged(self._index)
        place = f"{shown(self.path)}, row {number + 1} at byte {start:,}"
        row = parsed_line(place, self._reader.read(self.path, start, stop))
        if not isinstance(row, dict):
            raise UserError(f"{place} is a {type(row).__name__}, not an object with named columns.")
        return row


def _write_starts(path: str, file: BinaryIO) -> str:
    """Writes where each row begins, and the size of the file behind the last one: int64, little-endian."""
    count = 0
    with open_file(path) as source:
        for starts in _line_starts(source):
            file.write(starts.astype("<i8").tobytes())
            count += len(starts)
        file.write(np.array([source.tell()], "<i8").tobytes())
    return f"{count:,} rows"


def _line_starts(source: BinaryIO) -> Iterator[NDArray[np.int64]]:
    """Yields where lines begin that are not blank, of a block at a time, which ends with a whole line."""
    position = len(BYTE_ORDER_MARK) if source.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK else 0
    source.seek(position)
    rest = b""
    while block := source.read(_BLOCK):
        block = rest + block
        end = block.rfind(b"\n") + 1
        yield position + _starts_within(block[:end])
        position, rest = position + end, block[end:]
    yield position + _starts_within(rest)


def _starts_within(lines: bytes) -> NDArray[np.int64]:
    if not lines:
        return np.empty(0, np.int64)
    content = np.frombuffer(lines, np.uint8)
    starts = np.concatenate([[0], np.flatnonzero(content == ord("\n")) + 1])
    starts = starts[starts < len(content)]
    may_be_blank = np.flatnonzero(np.isin(content[starts], _BLANKS))
    ends = np.append(starts[1:], len(lines))
    blank = [index for index in may_be_blank if not lines[starts[index] : ends[index]].strip()]
    return np.delete(starts, blank)


class Parquet:
    """Reads rows of a Parquet file: row groups, of which the last used ones stay decoded, or a decoded copy.

    Args:
        path: path or address of the file.
        columns: to read. None: all.
        is_cached: read a copy as an Arrow file without compression, made once and mapped into memory, in which any row
            is found without decoding others.
        opened: keeps open files; the files of a dataset share it.

    Raises:
        UserError: it can't be read, or lacks a column.
    """

    def __init__(self, path: str, columns: Sequence[str] | None, is_cached: bool, opened: Recent) -> None:
        self.path, self.sources = path, [path]
        self._columns = list(columns) if columns is not None else None
        self._files = opened
        self._own = object()
        with self._opened() as file:
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            sizes = [group.num_rows for group in groups]
            self.decoded_bytes = 0 if is_cached else sum(map(self._size_of, groups))
            """About what all row groups take when decoded, if they are."""
            names = file.schema_arrow.names
        if missing := [name for name in self._columns or () if name not in names]:
            raise UserError(f"data.columns: {shown(path)} has no column {missing[0]}. It has {listed(names, 12)}.")
        self._copy: Mapped | None = None
        if is_cached:
            copy = made_once([path], "decoded-copy", self._write_copy, depends_on=self._columns)
            self._copy = Mapped(copy, torch.uint8)
            sizes = [size for rows in sizes for size in _batch_sizes(rows)]
            if (reader := _reader_of(self._copy)).num_record_batches != len(sizes):
                sizes = [reader.get_batch(number).num_rows for number in range(reader.num_record_batches)]
        self._ends = np.array([0, *accumulate(sizes)])
        self._of_copy: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_of_copy": None, "_own": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= {**state, "_own": object()}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def rows(self, numbers: Sequence[int]) -> list[Row]:
        wanted = np.asarray(numbers)
        pieces = np.searchsorted(self._ends, wanted, side="right") - 1
        found: list[Row] = [{}] * len(wanted)
        for piece in np.unique(pieces).tolist():
            places = np.flatnonzero(pieces == piece)
            table = self._piece(piece)
            for place in places.tolist():
                found[place] = table.slice(int(wanted[place] - self._ends[piece]), 1).to_pylist()[0]
        return found

    def _size_of(self, group: Any) -> int:
        chunks = (group.column(number) for number in range(group.num_columns))
        wanted = None if self._columns is None else set(self._columns)
        return sum(
            chunk.total_uncompressed_size
            for chunk in chunks
            if wanted is None or chunk.path_in_schema.partition(".")[0] in wanted
        )

    def _piece(self, piece: int) -> Any:
        if self._copy is not None:
            return self._reader().get_batch(piece)
        return _DECODED.get((self._own, piece), lambda: self._row_group(self._reader(), piece))

    def _row_group(self, file: Any, number: int) -> Any:
        try:
            return file.read_row_group(number, columns=self._columns, use_threads=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{shown(self.path)}, row group {number + 1} can't be read: {error}.") from error

    def _reader(self) -> Any:
        """Returns the open file, opened by this process: what forks share would have one position."""
        if self._copy is None:
            return self._files.get((os.getpid(), self.path), self._opened)
        if self._of_copy is None or self._of_copy[0] != os.getpid():
            self._of_copy = os.getpid(), _reader_of(self._copy)
        return self._of_copy[1]

    def _opened(self) -> Any:
        parquet = imported("pyarrow.parquet", "pyarrow")
        try:
            return parquet.ParquetFile(open_file(self.path) if is_remote(self.path) else local(self.path))
        except (OSError, ValueError) as error:
            raise UserError(f"{shown(self.path)} can't be read: {type(error).__name__}: {error}.") from error

    def _write_copy(self, file: BinaryIO) -> str:
        pyarrow = imported("pyarrow", "pyarrow")

        with self._opened() as source:
            first = _plain(source.schema_arrow.empty_table())
            schema = first.select(self._columns).schema if self._columns is not None else first.schema
            with pyarrow.ipc.new_file(file, schema) as writer:
                for number in range(source.metadata.num_row_groups):
                    table = _plain(self._row_group(source, number)).select(schema.names)
                    for start in range(0, table.num_rows, _ROWS_OF_BATCH):
                        # More than one batch where texts or bytes of a column exceed 2 GiB.
                        writer.write_table(table.slice(start, _ROWS_OF_BATCH).combine_chunks())
        return f"{source.metadata.num_rows:,} rows, {file.tell() / 1e6:,.1f} MB"


def _batch_sizes(rows: int) -> list[int]:
    return [min(_ROWS_OF_BATCH, rows - start) for start in range(0, rows, _ROWS_OF_BATCH)]


def _plain(table: Any) -> Any:
    """Returns a table without dictionaries, of which an Arrow file can hold but one for a column."""
    pyarrow = imported("pyarrow", "pyarrow")

    for place, field in enumerate(table.schema):
        if pyarrow.types.is_dictionary(field.type):
            table = table.set_column(place, field.name, table.column(place).cast(field.type.value_type))
    return table


def _reader_of(copy: Mapped) -> Any:
    pyarrow = imported("pyarrow", "pyarrow")

    options = pyarrow.ipc.IpcReadOptions(use_threads=False)
    return pyarrow.ipc.open_file(pyarrow.py_buffer(copy.array), options=options)


class Recent:
    """Keeps what was used last: tables, up to a number of bytes in all, or up to a number of other things."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[Any, Any] = OrderedDict()
        self._sum = 0

    def __reduce__(self) -> Any:
        return type(self), (self._most,)

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """Returns what belongs to a key, which is made if it isn't here any more."""
        found = self._kept.get(key)
        if found is None:
            found = self._kept[key] = make()
            self._sum += _size(found)
            while self._sum > self._most and len(self._kept) > 1:
                self._sum -= _size(self._kept.popitem(last=False)[1])
        self._kept.move_to_end(key)
        return found


_DECODED = Recent(MOST_DECODED)


def _size(kept: Any) -> int:
    return int(getattr(kept, "nbytes", 1))


class HubRows:
    """Reads rows of a dataset of Hugging Face, which maps its Arrow files into memory.

    Args:
        path: names it in messages.
        dataset: with the columns to read alone.
    """

    def __init__(self, path: str, dataset: Any) -> None:
        self.path = path
        self.sources = sorted({file["filename"] for file in dataset.cache_files})
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def rows(self, numbers: Sequence[int]) -> list[Row]:
        return list(self._dataset.__getitems__(list(numbers)))
