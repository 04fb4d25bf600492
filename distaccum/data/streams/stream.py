"""A dataset of samples that can only be read forwards, by their positions in an order that every process computes."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

from torch.utils.data import get_worker_info

from distaccum.data.splits import TRAIN, check_split
from distaccum.data.storage.files import list_files, require_named_once
from distaccum.data.streams.stream_reader import Cursor, Reader, StreamOrder, beginning
from distaccum.data.streams.stream_sources import Lines, as_source, counted
from distaccum.data.transformed import Transformed
from distaccum.errors import UserError, require, require_at_least
from distaccum.loaders._worker_internals import hidden_worker
from distaccum.planning.order import ENDLESS

logger = logging.getLogger(__name__)

_MOST_CURSORS = 1024


class Stream(Transformed):
    """Samples of a source that can only be read forwards; for `WindowLoader` and `EvaluationLoader`.

    Every process that loads reads the whole source in one order, which `StreamOrder` describes, and decodes and
    transforms its own samples alone. So no rank waits for another one's data, and all know where the source ends. In
    the loader's state are places in the shards from which reading goes on, at most one block before the next window.
    That holds for a source that gives the same samples whenever it is read.

    Args:
        source: an `IterableDataset` of torch or of Hugging Face's datasets; any other iterable that can be read again
            and again; `Lines`, `Shards`, or an object like them (see `Source`).
        num_samples: in an epoch; what the source has beyond is left out. None: counted by reading all of it once.
        endless: passes follow each other, each in an order of its own, and an epoch has no end.
        transform: makes a sample of what the source gives.
        shuffle: shuffle the shards of an epoch, and its samples within blocks. Otherwise all stays as it is.
        buffer: samples of a block; a process holds up to two blocks.
        lanes: shards that are read in turn.
        seed: decides the order together with the epoch.
        skip: samples at the beginning of the first shard that are left out.
        take: only so many samples, of the first shard.

    Attributes:
        is_ordered: its indices are positions, which are loaded in rising order.
        is_endless: as given.
        order: describes the order. Equal words and an equal source mean equal windows.
        collate_fn: the transform's or the source's, if it has one. Others of the transform's attributes are the
            dataset's too.

    Raises:
        UserError: the arguments don't fit; or when a sample is asked for, the source can't be read.
    """

    is_ordered = True

    def __init__(
        self,
        source: Any,
        *,
        num_samples: int | None = None,
        endless: bool = False,
        transform: Callable[[Any], Any] | None = None,
        shuffle: bool = True,
        buffer: int = 1000,
        lanes: int = 8,
        seed: int = 0,
        skip: int = 0,
        take: int | None = None,
    ) -> None:
        require_at_least(1, data__num_samples=num_samples, data__lanes=lanes, data__evaluation_samples=take)
        require_at_least(0, data__evaluation_samples=skip)
        require_at_least(16, data__buffer=buffer)
        super().__init__(transform)
        if endless and num_samples is not None:
            raise UserError(
                f"data.endless=true and data.num_samples={num_samples} contradict each other: leave one of them out."
            )
        self.source, self.is_endless = as_source(source), endless
        require(len(self.source.shards) > 0, "the stream has no shards: give at least one.")
        if take is not None:
            num_samples, shuffle = take, False
        size = num_samples if num_samples is not None else ENDLESS if endless else max(0, counted(self.source) - skip)
        self._order = StreamOrder(
            source=self.source,
            num_samples=size,
            is_endless=endless,
            is_shuffled=shuffle,
            block=buffer,
            lanes=lanes,
            seed=seed,
            skip=skip,
            is_part=take is not None,
        )
        names = hashlib.blake2b(repr([os.path.basename(str(s)) for s in self.source.shards]).encode(), digest_size=4)
        self.order = (
            f"stream of {len(self.source.shards)} shards ({names.hexdigest()}), "
            + (f"data.buffer={buffer}, data.lanes={lanes}" if shuffle else "data.shuffle=false")
            + (f", {skip} held out" if skip else "")
        )
        if not isinstance(self.source, Lines):
            logger.info(
                "the stream is read by each rank and worker, and again after a stop: windows stay the same as far as "
                "its source gives the same samples whenever it is read"
            )
        self._cursors: dict[tuple[int, int], Cursor] = {}
        self._news: list[Cursor] = []
        self._reader: Reader | None = None
        self._process = os.getpid()
        self._has_warned: set[str] = set()

    def __len__(self) -> int:
        return self._order.num_samples

    def __getitem__(self, index: int) -> Any:
        """Returns the sample at a position of epoch 0."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.samples_of_epoch(0, [index % len(self)])[0]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "collate_fn" and hasattr(self.__dict__.get("source"), name):
                return self.source.collate_fn  # type: ignore[attr-defined]
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}

    def samples_of_epoch(self, epoch: int, positions: Iterable[int]) -> list[Any]:
        """Returns the samples at positions of an epoch; quickly if no position lies far before the one asked for last.

        Raises:
            UserError: a shard can't be read, or the stream ends too early.
        """
        worker = get_worker_info()
        is_first = worker is None or worker.id == 0
        found: list[Any] = []
        positions = list(positions)
        with hidden_worker():
            for number, group in itertools.groupby(positions, lambda position: position // self._order.block):
                found += self._read(epoch, number, list(group), is_first)
        if not isinstance(self.source, Lines):
            places = (f"the stream's sample {position:,} of epoch {epoch}" for position in positions)
            return [self._transformed(sample, place) for sample, place in zip(found, places, strict=True)]
        return [self._transformed(self.source.decode(line), self.source.place(line)) for line in found]

    def _read(self, epoch: int, number: int, positions: list[int], is_first: bool) -> list[Any]:
        """Returns samples of one block, as they were read."""
        size = self._order.block
        try:
            reader = self._reader_at(epoch, number)
            # One block ahead, little by little: all at once would have the training wait at each block's beginning.
            reader.read_to(max(positions) + size + 1, keep_from=number)
            if is_first:
                self._look_beyond(reader)
        except BaseException:
            self._reader = None  # what has failed may go on as if it had ended
            raise
        places, block = self._order.places(epoch, number), reader.blocks[number]
        return [block[places[position - number * size]] for position in positions]

    def _reader_at(self, epoch: int, number: int) -> Reader:
        """Returns a reader that has the beginning of a block, or has not come to it yet."""
        reader = self._reader if self._process == os.getpid() else None  # a fork shares the place in an open file
        if reader is not None and reader.epoch == epoch and number in reader.blocks:
            return reader
        start = number * self._order.block
        best = self._nearest(epoch, start) or beginning(epoch)
        if reader is None or reader.epoch != epoch or not best["position"] <= reader.position <= start:
            reader = self._reader = None  # its files are closed first
            reader = Reader(self._order, best, self._note)
        self._reader, self._process = reader, os.getpid()
        return reader

    def _look_beyond(self, reader: Reader) -> None:
        if reader.position < len(self) or self._order.is_part or "more" in self._has_warned:
            return
        self._has_warned.add("more")
        with suppress(UserError):  # of what nobody needs
            if reader.has_more():
                logger.warning(
                    "the stream has more than num_samples=%s samples: the rest is left out, in each epoch another one",
                    f"{len(self):,}",
                )

    # Cursors

    def _nearest(self, epoch: int, position: int) -> Cursor | None:
        places = [place for place in self._cursors if place[0] == epoch and place[1] <= position]
        return self._cursors[max(places)] if places else None

    def _note(self, cursor: Cursor) -> None:
        place = cursor["epoch"], cursor["position"]
        known = self._cursors.get(place)
        if known is None:
            self._keep(cursor)
            self._news.append(cursor)
        elif known["check"] != cursor["check"] and "repeatable" not in self._has_warned:
            self._has_warned.add("repeatable")
            logger.warning(
                "the stream gives other samples than before at position %s of epoch %d: it has changed, is not "
                "repeatable, or is another one on each rank. A run that goes on does not see the windows then that an "
                "undisturbed one sees.",
                f"{cursor['position']:,}",
                cursor["epoch"],
            )

    def _keep(self, cursor: Cursor) -> None:
        self._cursors[cursor["epoch"], cursor["position"]] = cursor
        while len(self._cursors) > _MOST_CURSORS:
            del self._cursors[min(self._cursors)]

    def take_cursors(self) -> list[Cursor]:
        """Returns the cursors that have been noted since the last call."""
        news, self._news = self._news, []
        return news

    def cursors_at(self, epoch: int, positions: Sequence[int]) -> list[dict[str, Any]]:
        """Returns the last known cursors at or before positions, for `learn`."""
        found = [cursor for position in positions if (cursor := self._nearest(epoch, position)) is not None]
        return [{**cursor, "order": self._identity} for cursor in found]

    def learn(self, cursors: Iterable[dict[str, Any]]) -> None:
        """Takes over cursors of another process or run, as far as they are of the same order."""
        for cursor in cursors:
            if cursor.get("order", self._identity) == self._identity:
                known = {key: cursor[key] for key in Cursor.__annotations__}
                require(
                    all(0 <= lane[0] < len(self.source.shards) for lane in known["lanes"]),
                    "the checkpoint has places in shards that the stream doesn't have.",
                )
                if (known["epoch"], known["position"]) not in self._cursors:
                    self._keep(known)  # type: ignore[arg-type]

    def fingerprint(self) -> list[Any]:
        """Returns what is the same in every process that reads the same: JSON values. Reads the first sample."""
        found: list[Cursor] = []
        if len(self):
            with hidden_worker():
                Reader(self._order, beginning(0), found.append).read_to(1, keep_from=1)
        return [self._identity, len(self), *(cursor["check"] for cursor in found)]

    @property
    def _identity(self) -> str:
        return f"{self.order}, seed {self._order.seed}"


def stream_data(
    split: str = TRAIN,
    *,
    files: str | Sequence[str] | None = None,
    source: Any = None,
    evaluation_files: str | Sequence[str] | None = None,
    evaluation_samples: int | None = None,
    **options: Any,
) -> Stream:
    """Builds the stream of a configuration's `data`: a `source`, or the lines of `files`.

    Args:
        evaluation_files: files to evaluate on.
        evaluation_samples: without them: samples to evaluate on, held out of the beginning of the first shard.
        options: those of `Stream`.

    Raises:
        UserError: not exactly one of `files` and `source` is given, nothing to evaluate on, or a file for both; and as
            `Stream`.
    """
    check_split(split, "data=stream")
    if (files is None) == (source is None):
        raise UserError(
            f"data.files={files} and data.source={'null' if source is None else type(source).__name__}: give exactly "
            "one of them."
        )
    if files is not None and evaluation_files is not None:
        given = {"data.files": files, "data.evaluation_files": evaluation_files}
        require_named_once({key: list_files(patterns, key) for key, patterns in given.items()})
    if split == TRAIN:
        whole = source if source is not None else Lines(files or [])
        return Stream(whole, **options, skip=0 if evaluation_files is not None else evaluation_samples or 0)
    kept = {key: options[key] for key in ("transform", "buffer") if key in options}
    if evaluation_files is not None:
        return Stream(Lines(evaluation_files, "data.evaluation_files"), shuffle=False, **kept)
    if evaluation_samples is None:
        raise UserError(
            "data=stream has nothing to evaluate on: give data.evaluation_files or data.evaluation_samples, name a "
            "dataset of your own by data.evaluation._target_, or set data.evaluation=null."
        )
    return Stream(source if source is not None else Lines(files or []), take=evaluation_samples, **kept)
