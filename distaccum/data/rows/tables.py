"""Reads rows from files: JSON lines, JSON, CSV, Parquet, plain text, and folders of Hugging Face's datasets."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from distaccum.data.storage.files import list_files, open_file
from distaccum.data.storage.object_stores import shown
from distaccum.errors import UserError, listed

Row = dict[str, Any]
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def rows_of(files: str | Sequence[str], key: str) -> Iterator[tuple[str, Row]]:
    """Yields each row of all files with its place, such as `chat.jsonl, line 3`, for messages.

    Args:
        files: paths or patterns (`chats/*.jsonl`), local or in an object store (`s3://bucket/chats/*.jsonl`), which are
            read in the order given, those of a pattern by name.
            Endings: `.jsonl`, `.json` (a list of objects), `.csv` (with a header), `.parquet`, `.txt` (one row with
            the whole file as `text`); a folder is one that a `Dataset.save_to_disk` of datasets has written.
        key: the configuration key, for messages.

    Raises:
        UserError: a file isn't there, can't be read, or has no rows of this kind.
    """
    for path in list_files(files, key):
        yield from _rows(path, key)


def _rows(path: str, key: str) -> Iterator[tuple[str, Row]]:
    read = _read_dataset if os.path.isdir(path) else _READERS.get(os.path.splitext(path)[1].lower())
    if read is None:
        raise unknown_kind(key, path, list(_READERS))
    try:
        for place, row in read(path):
            if not isinstance(row, dict):
                raise UserError(f"{key}: {path}, {place} is a {type(row).__name__}, not an object with named columns.")
            yield f"{path}, {place}", row
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise UserError(f"{key}: {path} can't be read: {type(error).__name__}: {error}.") from error


def unknown_kind(key: str, path: str, endings: Sequence[str]) -> UserError:
    """Returns the error to raise for a file that has none of the known endings."""
    lines = next((ending for ending in (".jsonl.gz", ".txt.gz") if path.endswith(ending)), None)
    packed = f" Of {lines}, data=stream reads the lines." if lines else ""
    return UserError(
        f"{key}: {shown(path)} is of no known kind. Known endings are {', '.join(endings)}; a folder is one that "
        f"save_to_disk of datasets has written.{packed}"
    )


def _text(path: str, newline: str | None = None) -> io.TextIOWrapper:
    return io.TextIOWrapper(open_file(path), encoding="utf-8-sig", newline=newline)


def _read_json_lines(path: str) -> Iterator[tuple[str, Any]]:
    with open_file(path) as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            if line.strip():
                place = f"line {number}"
                yield place, parsed_line(f"{shown(path)}, {place}", line)


def parsed_line(place: str, line: bytes) -> Any:
    """Returns what a line of JSON holds.

    Raises:
        UserError: it isn't JSON in UTF-8; `place` says which line.
    """
    try:
        return json.loads(decoded(place, line))
    except RecursionError as error:
        raise UserError(f"{place} is no JSON: it is nested too deeply.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{place} is no JSON: {error.msg}, at its character {error.pos + 1:,}.") from error


def decoded(place: str, line: bytes) -> str:
    """Returns a line of UTF-8 as a text.

    Raises:
        UserError: it isn't UTF-8; `place` says which line.
    """
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place} is no UTF-8: {error.reason}, at its byte {error.start:,}. Convert the file: iconv -t UTF-8."
        ) from error


def _read_json(path: str) -> Iterator[tuple[str, Any]]:
    with _text(path) as file:
        found = json.load(file)
    if not isinstance(found, list):
        raise ValueError(f"it holds a {type(found).__name__}, not a list of objects")
    for number, row in enumerate(found, 1):
        yield f"object {number}", row


def _read_csv(path: str) -> Iterator[tuple[str, Any]]:
    with _text(path, newline="") as file:
        for number, row in enumerate(csv.DictReader(file, strict=True), 1):
            if None in row or None in row.values():
                raise ValueError(f"row {number} has another number of fields than the header")
            yield f"row {number}", row


def _read_parquet(path: str) -> Iterator[tuple[str, Any]]:
    parquet = imported("pyarrow.parquet", "pyarrow")
    number = 0
    with open_file(path) as raw, parquet.ParquetFile(raw) as file:
        for batch in file.iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row


def _read_text(path: str) -> Iterator[tuple[str, Any]]:
    with _text(path) as file:
        yield "text", {"text": file.read()}


def _read_dataset(path: str) -> Iterator[tuple[str, Any]]:
    datasets = imported("datasets", "datasets")
    found = datasets.load_from_disk(path)
    if isinstance(found, datasets.DatasetDict):
        raise ValueError(f"it has several parts: name one of {listed([os.path.join(path, part) for part in found], 6)}")
    for number, row in enumerate(found, 1):
        yield f"row {number}", row


def imported(module: str, package: str) -> Any:
    """Imports what reading a kind of file needs.

    Raises:
        UserError: it is missing.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f'{package} is needed to read this, and is missing: pip install "distaccum[hf]".') from error


_READERS: dict[str, Callable[[str], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
