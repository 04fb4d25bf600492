"""Tokens of samples, with a mark for each that the loss counts: in memory, or mapped from a file."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from distaccum.data.language.tokenization import Marked


def write_samples(file: BinaryIO, samples: Iterable[Marked], counts: Counter[str]) -> None:
    """Writes samples one after the other, so that few are in memory at a time.

    They are int32, those that the loss doesn't count as -1 - token; then, from a multiple of 8 bytes on, int64: where
    each sample ends; the counts as JSON; and as int64 the number of samples and the bytes of the counts.

    Args:
        counts: filled while `samples` is iterated over, and kept with them.
    """
    ends, position = array("q"), 0
    for tokens, marks in samples:
        found = np.array(tokens, dtype="<i4")
        file.write(np.where(marks, found, ~found).astype("<i4").tobytes())
        position += len(found)
        ends.append(position)
    said = json.dumps(counts).encode()
    file.write(bytes(-4 * position % 8) + np.array(ends, "<i8").tobytes() + said)
    file.write(np.array([len(ends), len(said)], "<i8").tobytes())


class MarkedTokens:
    """Samples that `write_samples` has written. Pickled by the file's path, if there is one.

    Args:
        source: the file's path, or what it would hold.

    Attributes:
        lengths: number of tokens of each sample.
        counts: as given to `write_samples`.
    """

    def __init__(self, source: Path | bytes) -> None:
        self._source = source
        content: NDArray[Any] = (
            np.frombuffer(source, np.uint8) if isinstance(source, bytes) else np.memmap(source, np.uint8, "r")
        )
        num_samples, num_said = content[-16:].view("<i8").tolist()
        last = len(content) - 16 - num_said
        first = last - 8 * num_samples
        self._ends: NDArray[np.int64] = content[first:last].view("<i8")
        self._tokens: NDArray[np.int32] = content[: first - first % 4].view("<i4")
        self.lengths = np.diff(self._ends, prepend=0)
        self.counts: Counter[str] = Counter(json.loads(content[last:-16].tobytes()))

    def __reduce__(self) -> Any:
        return type(self), (self._source,)

    def __len__(self) -> int:
        return len(self._ends)

    def sample(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Returns the tokens of a sample, and which of them the loss counts."""
        stop = int(self._ends[index])
        found = self._tokens[stop - int(self.lengths[index]) : stop].astype(np.int64)
        return np.maximum(found, ~found), found >= 0
