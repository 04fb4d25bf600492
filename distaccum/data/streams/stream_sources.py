"""Sources of a stream: lines of files, a function that opens shards, iterable datasets of torch and of Hugging Face."""

from __future__ import annotations

import gzip
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

from torch.utils.data import IterableDataset

from distaccum.data.rows.tables import BYTE_ORDER_MARK, decoded, parsed_line
from distaccum.data.storage.files import is_remote, list_files, open_file, require_named_once, size_and_version
from distaccum.data.storage.object_stores import shown
from distaccum.data.streams.stream_reader import Source, reason
from distaccum.errors import UserError, require
from distaccum.loaders._worker_internals import hidden_worker
from distaccum.runtime.cache import Remembered, fingerprint

logger = logging.getLogger(__name__)

_INSTEAD = {".parquet": "data=parquet", ".tar": "data=webdataset", ".bin": "data=tokens", ".npy": "data=tokens"}


class Shards:
    """Shards that a function opens.

    Args:
        shards: of any kind that can be printed, such as file names; or one pattern of files.
        open: takes a shard and where to start, and returns an iterator: see `Source.open`.
    """

    def __init__(self, shards: str | Sequence[Any], open: Callable[[Any, Any], Iterator[Any]]) -> None:
        self.shards: Sequence[Any] = list_files(shards, "shards") if isinstance(shards, str) else list(shards)
        require(callable(open), f"Shards: open={open!r} is no function of a shard and where to start.")
        self._open = open

    def open(self, shard: Any, start: Any) -> Iterator[Any]:
        return self._open(shard, start)


class Lines:
    """Lines of text files, each file a shard and each line a sample; a place in it is its offset in bytes.

    A line of a `.jsonl` is what it holds as JSON, of a `.txt` it is `{"text": …}` without the line's end. With `.gz`
    behind it, the file is compressed. Blank lines are no samples.

    Args:
        files: paths, patterns or addresses, as for `distaccum.data.storage.files.list_files`.
        key: the configuration key, for messages.

    Raises:
        UserError: a file isn't there, is named twice, or is of another kind.
    """

    def __init__(self, files: str | Sequence[str], key: str = "data.files") -> None:
        self.shards: Sequence[str] = list_files(files, key)
        require_named_once({key: self.shards})
        for path in self.shards:
            ending, _ = _kind(path)
            require(
                ending in (".jsonl", ".txt"),
                f"{key}: {shown(path)} is none of .jsonl, .txt, .jsonl.gz and .txt.gz, whose lines are read as a "
                f"stream. Take {_INSTEAD.get(ending, 'a file of these, or a data.source that opens it (Shards)')}.",
            )

    def open(self, shard: str, start: int) -> Iterator[tuple[str, int, bytes]]:
        return _LinesOfFile(shard, start)

    def decode(self, sample: tuple[str, int, bytes]) -> Any:
        """Makes a sample of a line, on the rank that it belongs to alone."""
        path, _, line = sample
        if _kind(path)[0] == ".jsonl":
            return parsed_line(self.place(sample), line)
        return {"text": decoded(self.place(sample), line).rstrip("\r\n")}

    @staticmethod
    def place(sample: tuple[str, int, bytes]) -> str:
        """Returns where a line stands, for messages."""
        path, start, _ = sample
        return f"{shown(path)}, the line at byte {start:,}"


@lru_cache(maxsize=4096)
def _kind(path: str) -> tuple[str, bool]:
    """Returns the ending of a file's name without `.gz`, and whether that is behind it."""
    name = (path.partition("?")[0] if is_remote(path) else path).lower()
    plain = name.removesuffix(".gz")
    return os.path.splitext(plain)[1], plain != name


class _LinesOfFile(Iterator[tuple[str, int, bytes]]):
    def __init__(self, path: str, start: int) -> None:
        self._path, self._place = path, start
        self._open = ExitStack()
        self._file: Any = self._open.enter_context(open_file(path))
        if _kind(path)[1]:
            self._file = self._open.enter_context(gzip.GzipFile(fileobj=self._file))
        self._file.seek(start)

    def __next__(self) -> tuple[str, int, bytes]:
        while line := self._file.readline():
            start = self._place
            self._place += len(line)
            if start == 0:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if not line.isspace():
                return self._path, start, line
        raise StopIteration

    def tell(self) -> int:
        return self._place

    def __del__(self) -> None:
        self._open.close()


class OfIterable:
    """A `torch.utils.data.IterableDataset`, or any other iterable, as one shard; to go on is to read up to there."""

    def __init__(self, dataset: Any) -> None:
        self.shards: Sequence[str] = [type(dataset).__name__]
        self._dataset = dataset

    def open(self, shard: str, start: int) -> Iterator[Any]:
        samples: Iterator[Any] = iter(self._dataset)
        for number in range(start):
            try:
                next(samples)
            except StopIteration:
                raise UserError(
                    f"it has ended after {number:,} samples, and had more when it was read before"
                ) from None
        return samples


class OfDatasets:
    """An `IterableDataset` of Hugging Face's datasets, by its shards; a place in one is its `state_dict()`.

    Raises:
        UserError: it is shuffled, or split by node, so that it can't go on from a place or differs between ranks.
    """

    def __init__(self, dataset: Any) -> None:
        shuffles, inner = False, getattr(dataset, "_ex_iterable", None)
        while inner is not None and not shuffles:
            shuffles = "Shuffled" in type(inner).__name__
            inner = getattr(inner, "ex_iterable", None)
        require(
            not shuffles,
            "the stream is a shuffled IterableDataset, whose buffer can't be restored. Leave out its .shuffle(…): the "
            "stream shuffles by itself (shuffle, buffer, lanes).",
        )
        require(
            not getattr(dataset, "_distributed", None),
            "the stream is an IterableDataset that was split by node. Leave out split_dataset_by_node: every rank "
            "reads the same stream, and takes its own samples of each window.",
        )
        self.shards: Sequence[int] = range(dataset.num_shards)
        self._dataset = dataset

    def open(self, shard: int, start: Any) -> Iterator[Any]:
        part = self._dataset.shard(num_shards=len(self.shards), index=shard)
        if start:
            part.load_state_dict(start)
        return _OfDataset(part, start)


class _OfDataset(Iterator[Any]):
    def __init__(self, part: Any, start: Any) -> None:
        self._part, self._samples = part, iter(part)
        self._start, self._has_begun = start, False

    def __next__(self) -> Any:
        self._has_begun = True
        return next(self._samples)

    def tell(self) -> Any:
        return self._part.state_dict() if self._has_begun else self._start


def as_source(source: Any) -> Source:
    """Returns a source of what a user has given.

    Raises:
        UserError: it is none of the kinds that can be read.
    """
    if hasattr(source, "shards") and callable(getattr(source, "open", None)):
        return source  # type: ignore[no-any-return]
    if type(source).__module__.partition(".")[0] == "datasets" and hasattr(source, "num_shards"):
        return OfDatasets(source)
    if isinstance(source, IterableDataset) or (hasattr(source, "__iter__") and not isinstance(source, Iterator)):
        return OfIterable(source)
    raise UserError(
        f"a {type(source).__name__} is no source of a stream. Give an IterableDataset, an object with `shards` and "
        "`open(shard, start)`, or distaccum.data.Shards(shards, open); no iterator, which can be read only once."
    )


def counted(source: Source) -> int:
    """Returns how many samples a source has, by reading all of it, unless its files have been counted before.

    Raises:
        UserError: it can't be read.
    """
    if not isinstance(source, Lines):
        logger.info(
            "the stream's samples are counted at each start, as nothing tells whether it has changed. Give "
            "num_samples, or endless=true, to do without."
        )
        return _count(source)
    files = [[shard, *size_and_version(shard)] for shard in source.shards]
    remembered = Remembered(f"samples-{fingerprint(files)}")
    with remembered.held():
        count = remembered.read()
        if not isinstance(count, int):
            count = _count(source)
            remembered.write(count)
    return count


def _count(source: Source) -> int:
    began, count = time.perf_counter(), 0
    with hidden_worker():
        for shard in source.shards:
            try:
                count += sum(1 for _ in source.open(shard, 0))
            except Exception as error:
                raise UserError(
                    f"shard {shard} of the stream can't be read to count its samples: {reason(error)}."
                ) from error
    logger.info("the stream has %s samples, counted in %.1f s", f"{count:,}", time.perf_counter() - began)
    return count
