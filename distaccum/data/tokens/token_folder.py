"""Writes folders of tokens, file by file, so that a process that is killed at any moment can go on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress, TextColumn

from distaccum.data.tokens.token_files import ENDS, INDEX
from distaccum.errors import UserError, require
from distaccum.runtime.files import WRITING, replacing, write_text
from distaccum.runtime.logs import console

Batch = tuple[NDArray[Any], NDArray[np.int64]]
"""Tokens of several documents, one after the other, and the length of each."""


class TokenFolder:
    """Writes a folder of tokens and its index: what that lists is complete, and nothing else counts."""

    def __init__(self, folder: Path, wanted: dict[str, Any], about: dict[str, Any]) -> None:
        self._folder = folder
        self.index: dict[str, Any] = {"made_from": wanted, **about, "complete": False, "files": []}
        for left in folder.glob(f".*{WRITING}"):  # by a process that was killed
            left.unlink()
        if (folder / INDEX).exists():
            try:
                before = json.loads((folder / INDEX).read_bytes())
                names = [name for name in wanted if before["made_from"].get(name) != wanted[name]]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{folder / INDEX} isn't what this command writes. Give another --out.") from error
            require(
                not names,
                f"{folder} holds what was made from another {' and '.join(names)}. Remove it, or give another --out.",
            )
            self.index = before

    @property
    def documents(self) -> int:
        """The number of documents that the complete files have."""
        return sum(entry["documents"] for entry in self.index["files"])

    def write(self, batches: Iterable[Batch], shard_tokens: int) -> None:
        """Writes files of what comes after the documents that are there."""
        with Progress(TextColumn("{task.description}"), console=console, transient=True, auto_refresh=False) as bar:
            shown, began, tokens, documents = bar.add_task(""), time.monotonic(), 0, self.documents

            def noted() -> Iterator[Batch]:
                nonlocal tokens, documents
                for batch in batches:
                    yield batch
                    tokens, documents = tokens + len(batch[0]), documents + len(batch[1])
                    speed = tokens / (time.monotonic() - began)
                    bar.update(shown, description=f"{documents:,} documents; {speed:,.0f} tokens/s", refresh=True)

            for parts, ends in _shards(noted(), shard_tokens):
                self._write_file(parts, ends)
        if not self.index["files"]:
            raise UserError("the FILES have no row. Give others.")
        self._commit(complete=True)

    def summary(self) -> str:
        """Says what the folder holds."""
        files = self.index["files"]
        tokens, number = sum(entry["tokens"] for entry in files), len(files)
        said = f"{self.documents:,} documents, {tokens:,} tokens ({self.index['dtype']}, vocabulary "
        said += f"{self.index['vocab_size']:,}) in {number:,} file{'s' * (number != 1)} in {self._folder}"
        return f"{said}\npython -m distaccum.train data=tokens data.files={self._folder} …"

    def _write_file(self, parts: list[NDArray[Any]], ends: list[NDArray[np.int64]]) -> None:
        path = self._folder / f"tokens-{len(self.index['files']):05d}.npy"
        count = int(ends[-1][-1])
        with replacing(path) as file:
            form = {"descr": np.dtype(self.index["dtype"]).str, "fortran_order": False, "shape": (count,)}
            np.lib.format.write_array_header_1_0(file, form)
            for part in parts:
                file.write(part.data)
        with replacing(path.with_suffix(ENDS)) as file:
            for some in ends:
                file.write(some.data)
        self.index["files"].append({"file": path.name, "tokens": count, "documents": sum(map(len, ends))})
        self._commit()
        console.print(f"{path}: {count:,} tokens")

    def _commit(self, *, complete: bool = False) -> None:
        self.index["complete"] = complete
        write_text(self._folder / INDEX, json.dumps(self.index, indent=1) + "\n")


def _shards(batches: Iterable[Batch], least: int) -> Iterator[tuple[list[NDArray[Any]], list[NDArray[np.int64]]]]:
    """Yields the tokens of each file, in parts, and where its documents end: with the document that fills it."""
    parts: list[NDArray[Any]] = []
    ends: list[NDArray[np.int64]] = []
    size = 0
    for tokens, lengths in batches:
        while len(lengths):
            stops = size + np.cumsum(lengths)
            taken = min(int(np.searchsorted(stops, least)) + 1, len(lengths))
            count = int(stops[taken - 1]) - size
            parts.append(tokens[:count])
            ends.append(stops[:taken])
            size += count
            tokens, lengths = tokens[count:], lengths[taken:]
            if size >= least:
                yield parts, ends
                parts, ends, size = [], [], 0
    if parts:
        yield parts, ends
