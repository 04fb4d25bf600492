"""Reads shards forwards in an order that is a function of seed, epoch and position, and can go on from noted places."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypedDict

import numpy as np
from torch import Tensor

from distaccum.errors import UserError
from distaccum.planning.order import shuffled
from distaccum.runtime.randomness import derived_seed

_END = object()


class Source(Protocol):
    """Shards that can be read forwards.

    Attributes:
        shards: of any kind that can be printed; their order decides that of the samples.
    """

    shards: Sequence[Any]

    def open(self, shard: Any, start: Any) -> Iterator[Any]:
        """Returns an iterator over a shard's samples.

        Args:
            start: 0 for all of them. Else what the method `tell()` of an earlier iterator has returned, a JSON value
                that says where its next sample begins; for iterators without `tell`, the number of samples to leave
                out.
        """
        ...


class Cursor(TypedDict):
    """The state of reading before a block: JSON values.

    `lanes` are the open shards: number, samples taken, and what `tell` has returned. `check` is a checksum of the
    block's first sample.
    """

    epoch: int
    position: int
    round: int
    begun: int
    turn: int
    lanes: list[list[Any]]
    check: int


def beginning(epoch: int) -> Cursor:
    """Returns the cursor of an epoch's beginning, before anything is known of its first sample."""
    return {"epoch": epoch, "position": 0, "round": 0, "begun": 0, "turn": 0, "lanes": [], "check": -1}


@dataclass(frozen=True, kw_only=True)
class StreamOrder:
    """The order of a stream's samples.

    The shards of an epoch are shuffled, and `lanes` of them read in turn, one sample of each; a shard that has ended
    makes room for the next one. What is read is cut into blocks of `block` samples, each shuffled by itself. So a
    position's sample is known from its block alone, and reading can go on from the beginning of any block.

    Attributes:
        num_samples: in an epoch.
        is_endless: an epoch goes through the shards again and again, shuffled anew each time.
        is_shuffled: otherwise shards are read one after the other as they are.
        skip: samples at the beginning of the first shard that are left out.
        is_part: of the first shard alone.
    """

    source: Source
    num_samples: int
    is_endless: bool = False
    is_shuffled: bool = True
    block: int = 1000
    lanes: int = 8
    seed: int = 0
    skip: int = 0
    is_part: bool = False

    def shards(self, epoch: int, round_: int) -> list[int]:
        """Returns the numbers of the shards in the order in which they are begun."""
        count = 1 if self.is_part else len(self.source.shards)
        if not self.is_shuffled or count < 2:
            return list(range(count))
        return shuffled(range(count), count, derived_seed(self.seed, "shards", round_), epoch).tolist()  # type: ignore[no-any-return]

    def places(self, epoch: int, number: int) -> Sequence[int]:
        """Returns which sample of a block, as it is read, each of its positions has."""
        size = min(self.block, self.num_samples - number * self.block)
        return _places(size, derived_seed(self.seed, "block", number), epoch) if self.is_shuffled else range(size)


@lru_cache(maxsize=4)
def _places(size: int, seed: int, epoch: int) -> list[int]:
    return shuffled(range(size), size, seed, epoch).tolist()  # type: ignore[no-any-return]


def reason(error: Exception) -> str:
    """Returns what an error says, with its kind unless it is a message of its own."""
    return str(error).rstrip(".") if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


class _Lane:
    """A shard that is being read."""

    def __init__(self, source: Source, shard: int, taken: int = 0, told: Any = None) -> None:
        self.shard, self.taken = shard, taken
        self._name = source.shards[shard]
        try:
            start = taken if told is None else told
            self._samples = iter(source.open(self._name, start))
        except Exception as error:
            raise self._unreadable(error) from error

    def next(self) -> Any:
        """Returns the next sample, or `_END`."""
        try:
            sample = next(self._samples, _END)
        except Exception as error:
            raise self._unreadable(error) from error
        self.taken += sample is not _END
        return sample

    def state(self) -> list[Any]:
        told = self._samples.tell() if hasattr(self._samples, "tell") else None
        try:
            json.dumps(told)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"shard {self._name} of the stream: tell() of its iterator returns {told!r}, which a checkpoint can't "
                f"hold: {error}. Have it return a JSON value, such as an int."
            ) from error
        return [self.shard, self.taken, told]

    def _unreadable(self, error: Exception) -> UserError:
        return UserError(
            f"shard {self._name} of the stream can't be read on after {self.taken:,} samples: {reason(error)}. Mend it "
            "and start again: a run with checkpoints goes on from the last one."
        )


class Reader:
    """Reads an epoch of a stream from a cursor on.

    Args:
        at_block: called with the cursor of each block when its first sample has been read.

    Attributes:
        position: number of samples that have been read of the epoch.
        blocks: those in memory, by their number, as far as they have been read.
    """

    def __init__(self, order: StreamOrder, cursor: Cursor, at_block: Callable[[Cursor], None]) -> None:
        self.epoch, self.position = cursor["epoch"], cursor["position"]
        self.blocks: dict[int, list[Any]] = {}
        self._order, self._at_block = order, at_block
        self._round, self._begun, self._turn = cursor["round"], cursor["begun"], cursor["turn"]
        self._lanes = [_Lane(order.source, *lane) for lane in cursor["lanes"]]
        self._shards = order.shards(self.epoch, self._round)
        self._most = order.lanes if order.is_shuffled else 1
        self._is_empty_round = False
        """Whether the stream has gone through all shards without a sample."""

    def read_to(self, stop: int, keep_from: int) -> None:
        """Reads up to a position, or to the end of the epoch.

        Args:
            keep_from: number of the first block that is still needed.

        Raises:
            UserError: a shard can't be read, or the stream ends too early.
        """
        for number in [number for number in self.blocks if number < keep_from]:
            del self.blocks[number]
        size = self._order.block
        while self.position < min(stop, self._order.num_samples):
            number = self.position // size
            before = self._cursor() if self.position % size == 0 else None
            sample = self._next()
            if sample is _END:
                raise UserError(
                    f"the stream has ended after {self.position:,} samples in epoch {self.epoch}, and "
                    f"num_samples={self._order.num_samples:,}. Give the number that there are, or none to have them "
                    "counted; and let every process read the same: what divides itself up by rank or worker can't be "
                    "read in one order."
                )
            if before is not None:
                self._at_block({**before, "check": checksum(sample)})
            if number >= keep_from:
                self.blocks.setdefault(number, []).append(sample)
            self.position += 1

    def has_more(self) -> bool:
        """Returns whether there are samples left after the epoch's last one. Nothing can be read afterwards."""
        return self._next() is not _END

    def _next(self) -> Any:
        while True:
            while len(self._lanes) < self._most and self._begun < len(self._shards):
                self._lanes.append(self._opened())
            if not self._lanes:
                if not self._order.is_endless:
                    return _END
                self._next_round()
                continue
            sample = self._lanes[self._turn].next()
            if sample is not _END:
                self._turn = (self._turn + 1) % len(self._lanes)
                self._is_empty_round = False
                return sample
            if self._begun < len(self._shards):
                self._lanes[self._turn] = self._opened()
            else:
                del self._lanes[self._turn]
                self._turn %= max(1, len(self._lanes))

    def _opened(self) -> _Lane:
        shard = self._shards[self._begun]
        self._begun += 1
        lane = _Lane(self._order.source, shard)
        for _ in range(self._order.skip if shard == 0 else 0):
            if lane.next() is _END:
                raise UserError(
                    f"the stream's first shard has {lane.taken:,} samples, fewer than the {self._order.skip:,} that "
                    "are held out of it for evaluation. Hold out fewer, or evaluate on files of their own."
                )
        return lane

    def _next_round(self) -> None:
        if self._is_empty_round:
            raise UserError("the stream has no samples: all of its shards are empty.")
        self._is_empty_round = True
        self._round, self._begun, self._turn = self._round + 1, 0, 0
        self._shards = self._order.shards(self.epoch, self._round)

    def _cursor(self) -> Cursor:
        return {
            "epoch": self.epoch,
            "position": self.position,
            "round": self._round,
            "begun": self._begun,
            "turn": self._turn,
            "lanes": [lane.state() for lane in self._lanes],
            "check": -1,
        }


def checksum(sample: Any) -> int:
    """Returns a number that is almost always another one for another sample; 0 for what it can't look into."""
    match sample:
        case bytes():
            return zlib.crc32(sample)
        case str() | int() | float() | None:
            return zlib.crc32(repr(sample).encode())
        case Tensor():
            return 0 if sample.is_sparse else zlib.crc32(repr(sample.tolist()).encode())
        case np.ndarray() | np.generic():
            return zlib.crc32(repr(sample.tolist()).encode())
        case Mapping():
            return checksum([*sample.keys(), *sample.values()])
        case tuple() | list():
            return zlib.crc32(",".join(str(checksum(entry)) for entry in sample).encode())
    return 0
