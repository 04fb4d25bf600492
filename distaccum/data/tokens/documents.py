"""Samples of whole documents in files of tokens: found once, kept in a file, and read from it one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from distaccum.data.splits import EVALUATION, HeldOut
from distaccum.data.storage.files import RangeReader, size_and_version
from distaccum.data.storage.made_once import Mapped, made_once
from distaccum.data.tokens.token_files import Tokens
from distaccum.errors import UserError

_TOKENS_AT_ONCE = 1 << 22
_DOCUMENTS_AT_ONCE = 1 << 14
_HEADER = 4
"""int64 before the samples: documents, those that are several samples, those that are none, tokens left over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentCut:
    """Says how documents become samples.

    Attributes:
        end_token: ends each document; None: files beside those of tokens say where they end.
        max_length: longest sample. Longer documents are cut into consecutive ones.
        ahead: tokens that belong to a sample beyond its length, 0 or 1: the last target.
        evaluation_fraction: part of the documents that is held out.
        split: the part to take; None: all documents.
    """

    end_token: int | None
    max_length: int
    ahead: int
    evaluation_fraction: float
    split: str | None


class DocumentSamples:
    """First token and length of each sample, in the order of the documents.

    Raises:
        UserError: it isn't known where documents end, or a file can't be read.
    """

    def __init__(self, tokens: Tokens, cut: DocumentCut) -> None:
        ends = [_ends_of(tokens, number, cut.end_token) for number in range(len(tokens.files))]
        sources = [*(file.path for file in tokens.files), *ends]
        path = made_once(
            sources, "document-samples", lambda file: _write_samples(file, tokens, ends, cut), depends_on=str(cut)
        )
        self._numbers = Mapped(path)
        self.documents, self.several, self.none, self.left_over = self._numbers.array[:_HEADER].tolist()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[int, int]:
        start, length = self._numbers.array[_HEADER:].reshape(-1, 2)[index].tolist()
        return start, length

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The length of each sample, mapped into memory."""
        return self._numbers.array[_HEADER:].reshape(-1, 2)[:, 1]


def _ends_of(tokens: Tokens, number: int, end_token: int | None) -> str:
    """Returns the path of a file that says where the documents of a file end."""
    file = tokens.files[number]
    if end_token is None:
        try:
            size_and_version(file.ends)
        except UserError as error:
            raise UserError(
                f"data.whole_documents=true: nothing says where the documents of {file.path} end. Give data.end_token, "
                f"the token at the end of each (50256 for GPT-2's), or files made by distaccum.data.tokenize."
            ) from error
        return file.ends
    return str(
        made_once(
            [file.path],
            "document-ends",
            lambda found: _write_ends(found, tokens, number, end_token),
            depends_on=[file.dtype, end_token],
        )
    )


def _write_ends(found: BinaryIO, tokens: Tokens, number: int, end_token: int) -> str:
    file, count = tokens.files[number], 0
    for start in range(0, file.count, _TOKENS_AT_ONCE):
        part = tokens.part(number, start, min(start + _TOKENS_AT_ONCE, file.count))
        ends = np.flatnonzero(part == end_token).astype(np.int64) + (start + 1)
        found.write(ends.tobytes())
        count += len(ends)
    return f"{count:,} documents end there"


def _documents(tokens: Tokens, ends: list[str]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yields where documents start and end, some at a time; what follows the last end is one more."""
    start, reader = 0, RangeReader(most_open=1)
    for number, path in enumerate(ends):
        size, _ = size_and_version(path)
        for first in range(0, size, 8 * _DOCUMENTS_AT_ONCE):
            content = reader.read(path, first, min(first + 8 * _DOCUMENTS_AT_ONCE, size))
            stops = np.frombuffer(content[: len(content) // 8 * 8], np.int64) + tokens.starts[number]
            starts = np.concatenate([[start], stops[:-1]])
            if len(content) % 8 or (stops <= starts).any() or stops[-1] > tokens.starts[number + 1]:
                raise UserError(
                    f"{path} doesn't belong to {tokens.files[number].path}: it must hold int64 numbers of tokens that "
                    "rise. Make both anew."
                )
            start = int(stops[-1])
            yield starts, stops
    if start == 0:
        raise UserError(
            f"data.end_token is nowhere in {tokens.files[0].path} and the other files, so all would be one document. "
            "Give the one that ends documents, or set data.whole_documents=false."
        )
    if start < len(tokens):
        yield np.array([start]), np.array([len(tokens)])


def _write_samples(file: BinaryIO, tokens: Tokens, ends: list[str], cut: DocumentCut) -> str:
    counts, number, most = np.zeros(_HEADER, np.int64), 0, cut.max_length
    held_out = HeldOut(cut.evaluation_fraction)
    least = 2 - cut.ahead  # a token and the next one
    file.write(counts.tobytes())
    for starts, stops in _documents(tokens, ends):
        if cut.split is not None:
            taken = held_out.contains(number, len(starts)) == (cut.split == EVALUATION)
            number += len(starts)
            starts, stops = starts[taken], stops[taken]
        lengths = stops - starts - cut.ahead
        over = lengths % most
        pieces = lengths // most + (over >= least)
        owners = np.repeat(np.arange(len(pieces)), pieces)
        begins = starts[owners] + most * (np.arange(len(owners)) - (np.cumsum(pieces) - pieces)[owners])
        samples = np.stack([begins, np.minimum(most, stops[owners] - cut.ahead - begins)], axis=1)
        file.write(samples.tobytes())
        counts += [len(pieces), (pieces > 1).sum(), (pieces == 0).sum(), over[(pieces > 0) & (over < least)].sum()]
    file.seek(0)
    file.write(counts.tobytes())
    return f"{counts[0]:,} documents"
