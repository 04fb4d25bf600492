"""Windows and cuts as index arithmetic: integers in, integers out.

A *window* is the set of samples behind one update, a function of seed, epoch, position in the epoch and global batch
size alone. A *cut* deals a window out to ranks and micro-steps. Nothing here knows a device or a model.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import eq, itemgetter
from typing import overload

from distaccum.errors import UserError

DEFAULT_MICRO_BATCH_SIZE = 16
"""Samples per micro-batch when only the global batch is given: small enough for most memories."""


def split_evenly(total: int, parts: int) -> list[int]:
    """Returns the sizes of `parts` parts of `total` that differ by at most one, larger parts first."""
    small, larger_parts = divmod(total, parts)
    return [small + 1] * larger_parts + [small] * (parts - larger_parts)


def split_by_speed(total: int, speeds: Sequence[float]) -> list[int]:
    """Splits `total` in proportion to speeds, each part at least 1; the largest remainders are rounded up."""
    spare = total - len(speeds)
    exact = [spare * speed / sum(speeds) for speed in speeds]
    sizes = [1 + int(part) for part in exact]
    by_remainder = sorted(range(len(speeds)), key=lambda part: (int(exact[part]) - exact[part], part))
    for part in by_remainder[: total - sum(sizes)]:
        sizes[part] += 1
    return sizes


class WindowBounds(Sequence[tuple[int, int]]):
    """The first position and the position after the last of each window of an epoch, computed when asked for.

    Takes memory for each run of windows of one size, and none for each window.

    Args:
        runs: of windows of one size, one after the other: position, size, number of windows.
        num_samples: of the epoch; the last window ends there if it is smaller than its size.
    """

    def __init__(self, runs: Iterable[tuple[int, int, int]], num_samples: int) -> None:
        self._runs = [run for run in runs if run[2]]
        self._firsts = [0, *accumulate(count for _, _, count in self._runs)]
        self._num_samples = num_samples

    def __len__(self) -> int:
        return self._firsts[-1]

    @overload
    def __getitem__(self, index: int) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[int, int]]: ...
    def __getitem__(self, index: int | slice) -> tuple[int, int] | list[tuple[int, int]]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        run = bisect_right(self._firsts, place) - 1
        position, size, _ = self._runs[run]
        start = position + (place - self._firsts[run]) * size
        return start, min(start + size, self._num_samples)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    def starting_before(self, position: int) -> int:
        """Returns the number of windows that begin before a position."""
        return bisect_left(self, position, key=itemgetter(0))


def window_bounds(num_samples: int, global_batch_size: int, drop_last: bool = False) -> WindowBounds:
    """Returns the first position and the position after the last of each window of an epoch."""
    count = num_samples // global_batch_size if drop_last else -(-num_samples // global_batch_size)
    return WindowBounds([(0, global_batch_size, count)], num_samples)


ONE_SYNC = "1 sync per update"
"""What a plan's line says of the sync, whatever the strategy."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The samples of one window, dealt to ranks and micro-steps.

    Attributes:
        sizes: for each rank, the number of samples of each of its micro-steps. A size of 0 is a placeholder: a
            micro-step of weight zero that a rank takes because the others need it in their collectives.
    """

    sizes: tuple[tuple[int, ...], ...]

    @property
    def window_size(self) -> int:
        return sum(map(sum, self.sizes))

    def micro_batches(self, rank: int) -> Iterator[tuple[int, int]]:
        """Yields the bounds of a rank's micro-batches, as positions in the window."""
        stop = sum(sum(sizes) for sizes in self.sizes[:rank])
        for size in self.sizes[rank]:
            start, stop = stop, stop + size
            yield start, stop


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """A global batch size and the rule by which windows are cut. Made by `resolve_batch`.

    Attributes:
        global_batch_size: samples per window, over all ranks.
        world_size: number of ranks.
        micro_batch_size: largest micro-batch, or None when `accumulation_steps` rules.
        accumulation_steps: micro-steps of each rank, or None when `micro_batch_size` rules.
        equal_micro_steps: every rank takes the same number of micro-steps, as collectives in the forward need.
    """

    global_batch_size: int
    world_size: int
    micro_batch_size: int | None
    accumulation_steps: int | None
    equal_micro_steps: bool = False

    def cut(self, window_size: int, speeds: Sequence[float] | None = None, least_parts: int = 1) -> Cut:
        """Cuts a window evenly: shares of the ranks, and micro-batches of a rank, differ by at most one sample.

        Args:
            speeds: of the ranks; shares are then in proportion to them.
            least_parts: on one rank, take so many micro-steps at least, if there are as many samples.
        """
        if speeds is None or window_size < self.world_size:
            shares = split_evenly(window_size, self.world_size)
        else:
            shares = split_by_speed(window_size, speeds)
        steps = [self._micro_steps(share) for share in shares]
        if self.world_size == 1:
            steps = [max(steps[0], min(least_parts, window_size))]
        if self.equal_micro_steps:
            steps = [max(steps)] * self.world_size
        return Cut(tuple(tuple(split_evenly(share, count)) for share, count in zip(shares, steps, strict=True)))

    @property
    def is_one_shot(self) -> bool:
        """Whether a whole window is one micro-batch on one rank."""
        return self.world_size == 1 and self._micro_steps(self.global_batch_size) == 1

    def _micro_steps(self, share: int) -> int:
        if self.accumulation_steps is not None:
            return max(1, min(self.accumulation_steps, share))
        assert self.micro_batch_size is not None
        return max(1, -(-share // self.micro_batch_size))

    def explain(self, num_samples: int | None = None, drop_last: bool = False, how: str | None = None) -> str:
        """Says in one line how a window is cut, and how large an epoch's last window is if it is smaller.

        Args:
            how: describes a rank's part, if it is not cut evenly.
        """
        windows = window_bounds(num_samples or 0, self.global_batch_size, drop_last)
        full = min(self.global_batch_size, num_samples) if num_samples else self.global_batch_size
        cut = self.cut(full)
        ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
        if how is None:
            steps = _range_in_words([len(sizes) for sizes in cut.sizes])
            sizes = _range_in_words([size for sizes in cut.sizes for size in sizes])
            how = f"{steps} micro-step{'' if steps == '1' else 's'} × {sizes}"
        line = f"window {full} = {ranks} × {how}; "
        line += ONE_SYNC if self.world_size > 1 else "no sync needed"
        if full < self.global_batch_size:
            line += f" (all {full} samples there are, fewer than the global batch of {self.global_batch_size})"
        elif windows and (tail := windows[-1][1] - windows[-1][0]) < full:
            line += f"; {len(windows)} windows an epoch, the last of {tail}"
        elif num_samples:
            dropped = num_samples - len(windows) * full
            line += f"; {len(windows)} windows an epoch" + (f", {dropped} samples left out" if dropped else "")
        return line


def _range_in_words(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}–{high}"


def resolve_batch(
    *,
    world_size: int,
    global_batch_size: int | None = None,
    micro_batch_size: int | None = None,
    accumulation_steps: int | None = None,
    equal_micro_steps: bool = False,
) -> BatchPlan:
    """Derives what was not given of global batch, micro-batch and accumulation steps.

    Give the global size and at most one of the others, or both others and no global size. All three are taken too if
    they agree. A global batch that doesn't divide evenly is fine.

    Raises:
        UserError: too little is given, or the numbers contradict each other.
    """
    given = (
        f"batch.global_batch_size={_shown(global_batch_size)}, batch.micro_batch_size={_shown(micro_batch_size)}, "
        f"batch.accumulation_steps={_shown(accumulation_steps)}, world size {world_size}"
    )

    def impossible(why: str) -> UserError:
        return UserError(f"the batch numbers don't fit together ({given}): {why}")

    for number in (global_batch_size, micro_batch_size, accumulation_steps):
        if number is not None and number < 1:
            raise impossible("each must be at least 1.")
    if global_batch_size is None:
        if micro_batch_size is None or accumulation_steps is None:
            raise impossible("without a global batch both the micro-batch and the accumulation steps are needed.")
        global_batch_size = micro_batch_size * accumulation_steps * world_size
    elif micro_batch_size is not None and accumulation_steps is not None:
        product = micro_batch_size * accumulation_steps * world_size
        if product != global_batch_size:
            raise impossible(
                f"{micro_batch_size} × {accumulation_steps} × {world_size} ranks = {product}, not {global_batch_size}. "
                "Leave one of the three out (null) and it follows from the others."
            )
    if global_batch_size < world_size:
        raise impossible("a window needs at least one sample per rank. Raise the global batch or start fewer ranks.")
    if micro_batch_size is not None and micro_batch_size > global_batch_size:
        raise impossible("a micro-batch can't be larger than the window it is a part of.")
    smallest_share = global_batch_size // world_size
    if accumulation_steps is not None and accumulation_steps > smallest_share:
        raise impossible(
            f"a rank's share of the window is {smallest_share} samples, too few for {accumulation_steps} micro-steps. "
            f"Take at most {smallest_share} accumulation steps."
        )
    if micro_batch_size is None and accumulation_steps is None:
        micro_batch_size = DEFAULT_MICRO_BATCH_SIZE
    return BatchPlan(
        global_batch_size=global_batch_size,
        world_size=world_size,
        # Where steps are given they rule: a share of 9 in 4 steps has micro-batches of 3, 2, 2 and 2, not 3, 3 and 3.
        micro_batch_size=None if accumulation_steps is not None else micro_batch_size,
        accumulation_steps=accumulation_steps,
        equal_micro_steps=equal_micro_steps,
    )


def _shown(number: int | None) -> str:
    return "null" if number is None else str(number)
