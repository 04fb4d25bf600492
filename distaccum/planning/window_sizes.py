"""Batch schedules as index arithmetic: how many samples each window has, and so where the windows of an epoch are.

Windows are numbered from 0 over the whole run. Each epoch begins anew at position 0, and its last window may be ragged.
Nothing here knows a rank, a device or a model, so a run has the same windows wherever it goes on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any

from distaccum.errors import UserError, require
from distaccum.planning.batch_plan import WindowBounds

_WORTH_A_CHANGE = 1.2
"""Sizes that follow the noise scale stay as they are unless they would change by this factor at least."""
_FEWEST_MEASUREMENTS = 5
"""Measurements of the noise scale before sizes follow it."""
_LARGEST_CHANGE = 2.0
"""The noise scale is known badly at times: sizes change by no more than this factor at once."""


class SizeRule(ABC):
    """A rule for the planned number of samples of each window.

    Attributes:
        base: the size at which the learning rate is as configured.
        smallest, largest: of all sizes that the rule may choose.
    """

    base: int
    smallest: int
    largest: int

    @abstractmethod
    def at(self, epoch: int, number: int) -> tuple[int, int | None]:
        """Returns the size of a window, and the first window at which it may change; None if not in this epoch."""

    def is_settled(self, epoch: int, number: int) -> bool:
        """Whether all windows from this one on have the same size, as far as is known."""
        return self.at(epoch, number)[1] is None

    @abstractmethod
    def __str__(self) -> str:
        """Describes the rule. Equal words mean equal windows."""


class ConstantSize(SizeRule):
    """One size for all windows."""

    def __init__(self, size: int) -> None:
        self.base = self.smallest = self.largest = size

    def at(self, epoch: int, number: int) -> tuple[int, int | None]:
        return self.base, None

    def __str__(self) -> str:
        return "constant"


class SizeTable(SizeRule):
    """Sizes by update or by epoch.

    Args:
        base: the size before the first entry.
        table: sizes by the update (from 1) or the epoch (from 0) that they begin with.
        by_epoch: the table's keys are epochs.
    """

    def __init__(self, base: int, table: Mapping[int, int], *, by_epoch: bool = False) -> None:
        self.base = base
        self._by_epoch = by_epoch
        first = 0 if by_epoch else 1
        entries = sorted((key - first, size) for key, size in table.items())
        self._entries = entries if entries and entries[0][0] <= 0 else [(0, base), *entries]
        sizes = [size for _, size in self._entries]
        self.smallest, self.largest = min(sizes), max(sizes)

    def _entry(self, place: int) -> int:
        return max(0, bisect_right(self._entries, place, key=itemgetter(0)) - 1)

    def at(self, epoch: int, number: int) -> tuple[int, int | None]:
        entry = self._entry(epoch if self._by_epoch else number)
        is_last = self._by_epoch or entry + 1 == len(self._entries)
        return self._entries[entry][1], None if is_last else self._entries[entry + 1][0]

    def is_settled(self, epoch: int, number: int) -> bool:
        return self._entry(epoch if self._by_epoch else number) + 1 == len(self._entries)

    def __str__(self) -> str:
        first = 0 if self._by_epoch else 1
        shown = ", ".join(f"{size} from {key + first} on" for key, size in self._entries)
        return f"table by {'epoch' if self._by_epoch else 'update'}: {shown}"


class SizeRamp(SizeRule):
    """A straight line from one size to another over the updates, rounded down.

    Args:
        base: the size at the end.
        start: the size of the first window.
        updates: the number of windows before the first of the final size.
    """

    def __init__(self, base: int, *, start: int, updates: int) -> None:
        self.base, self._start, self._updates = base, start, updates
        self.smallest, self.largest = min(base, start), max(base, start)

    def at(self, epoch: int, number: int) -> tuple[int, int | None]:
        if number >= self._updates:
            return self.base, None
        rise = self.base - self._start
        risen = rise * number // self._updates
        later = self._updates
        if rise > 0:  # where rise · number / updates comes to the next whole number
            later = -(-(risen + 1) * self._updates // rise)
        elif rise < 0:  # where it comes to be less than this one
            later = risen * self._updates // rise + 1
        return self._start + risen, min(later, self._updates)

    def __str__(self) -> str:
        return f"ramp from {self._start} to {self.base} over {self._updates} updates"


class NoiseSizes(SizeRule):
    """Sizes that follow the noise scale between two bounds, in multiples of the lower one.

    Where a batch is as large as the noise scale, neither samples nor updates are wasted by more than a factor of two
    (McCandlish et al. 2018, section 2.3).

    Args:
        base: the size that the run begins with.

    Attributes:
        changes: all sizes chosen so far, each with the first window it was in force for.
    """

    def __init__(self, base: int, *, smallest: int, largest: int) -> None:
        self.base, self.smallest, self.largest = base, smallest, largest
        self.changes: list[tuple[int, int]] = [(0, base)]

    def at(self, epoch: int, number: int) -> tuple[int, int | None]:
        entry = bisect_right(self.changes, number, key=itemgetter(0)) - 1
        later = self.changes[entry + 1][0] if entry + 1 < len(self.changes) else None
        return self.changes[entry][1], later

    def wanted(self, noise_scale: float, measurements: int) -> int | None:
        """Returns the size to change to; None to stay with the one chosen last.

        Args:
            noise_scale: in samples; infinite where the gradient can't be distinguished from noise.
            measurements: number of measurements behind it.
        """
        if measurements < _FEWEST_MEASUREMENTS:
            return None
        now = self.changes[-1][1]
        bounded = min(max(noise_scale, now / _LARGEST_CHANGE), now * _LARGEST_CHANGE)
        size = self.smallest * max(1, round(bounded / self.smallest))
        size = min(max(size, self.smallest), self.largest)
        return size if max(size / now, now / size) >= _WORTH_A_CHANGE else None

    def __str__(self) -> str:
        return f"noise scale between {self.smallest} and {self.largest}, beginning with {self.base}"


class BatchSizes:
    """The windows of a run: where they begin and end in the order of their epoch, and how they are numbered.

    Args:
        rule: the planned size of each.
        num_samples: in an epoch.
        drop_last: leave out an epoch's last window when it is smaller than planned.
    """

    def __init__(self, rule: SizeRule, num_samples: int, drop_last: bool = False) -> None:
        self.rule = rule
        self.num_samples = num_samples
        self.drop_last = drop_last
        self._firsts = [0]
        # Of the epoch in use, the one that is being loaded, and neighbours.
        self._kept_bounds = lru_cache(maxsize=4)(self._bounds)

    def check(self, world_size: int) -> None:
        """Refuses impossible sizes.

        Raises:
            UserError: the data or a window would have fewer samples than there are ranks, or all would be left out.
        """
        if self.num_samples < world_size:
            raise UserError(
                f"the training data has {self.num_samples} sample{'' if self.num_samples == 1 else 's'}, fewer than "
                f"the {world_size} ranks. Start fewer ranks or give more data."
            )
        if self.rule.smallest < world_size:
            raise UserError(
                f"batch.schedule ({self.rule}) has windows of {self.rule.smallest} samples, fewer than the "
                f"{world_size} ranks: a window needs at least one sample per rank. Raise its smallest size or "
                "start fewer ranks."
            )
        if self.drop_last and self.rule.largest > self.num_samples:
            size = "batch.global_batch_size" if self.is_constant else "the largest size of batch.schedule"
            raise UserError(
                f"the training data has {self.num_samples} samples, fewer than one window of {self.rule.largest}, and "
                f"batch.drop_last=true would leave out all of them. Lower {size} or set batch.drop_last=false."
            )

    @property
    def is_constant(self) -> bool:
        return isinstance(self.rule, ConstantSize)

    def bounds(self, epoch: int) -> WindowBounds:
        """Returns the first position and the position after the last of each window of an epoch."""
        return self._kept_bounds(0 if self.is_constant else epoch)

    def _bounds(self, epoch: int) -> WindowBounds:
        return WindowBounds(self._runs(epoch, self.first_number(epoch)), self.num_samples)

    def count(self, epoch: int) -> int:
        """Returns the number of windows in an epoch."""
        return len(self.bounds(epoch))

    def first_number(self, epoch: int) -> int:
        """Returns the number of windows in all epochs before."""
        if epoch and self.is_constant:
            return epoch * self.count(epoch)
        while len(self._firsts) <= epoch:
            last = len(self._firsts) - 1
            first = self._firsts[last]
            if self.rule.is_settled(last, first):
                return first + (epoch - last) * self._count_from(last, first)
            self._firsts.append(first + self._count_from(last, first))
        return self._firsts[epoch]

    def number(self, epoch: int, index: int) -> int:
        """Returns the number of a window, counted over all epochs."""
        return self.first_number(epoch) + index

    def size(self, epoch: int, index: int) -> int:
        """Returns the number of samples of a window."""
        start, stop = self.bounds(epoch)[index]
        return stop - start

    def planned(self, epoch: int, index: int) -> int:
        """Returns the planned size of a window; its epoch's last one may be smaller."""
        return self.rule.at(epoch, self.number(epoch, index))[0]

    def ratio(self, epoch: int, index: int) -> float:
        """Returns the planned size of a window over the one that the learning rate is given for."""
        planned = min(self.planned(epoch, index), self.num_samples)
        return planned / min(self.rule.base, self.num_samples)

    def change(self, size: int, first: int) -> None:
        """Puts another size in force, from a window on that no rank has begun to load. For `NoiseSizes` alone."""
        assert isinstance(self.rule, NoiseSizes)
        assert first > self.rule.changes[-1][0], "sizes change one after the other"
        known = [number for number in self._firsts if number <= first]  # epochs that begin before stay where they are
        self._set_changes([*self.rule.changes, (first, size)])
        self._firsts = known

    def state_dict(self) -> dict[str, Any]:
        """Returns the sizes that were chosen on the way. All else follows from the plan."""
        return {"size_changes": self.rule.changes} if isinstance(self.rule, NoiseSizes) else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the sizes of `state_dict()`'s answer."""
        if isinstance(self.rule, NoiseSizes) and "size_changes" in state:
            changes: Sequence[Sequence[int]] = state["size_changes"]
            require(
                all(size >= 1 for _, size in changes) and bool(changes) and changes[0][0] == 0,
                f"the checkpoint's batch sizes are not what a run has saved: {list(changes)}.",
            )
            self._set_changes([(int(first), int(size)) for first, size in changes])

    def _set_changes(self, changes: list[tuple[int, int]]) -> None:
        assert isinstance(self.rule, NoiseSizes)
        self.rule.changes = changes
        self._firsts = [0]
        self._kept_bounds.cache_clear()

    def _count_from(self, epoch: int, first_number: int) -> int:
        return sum(count for _, _, count in self._runs(epoch, first_number))

    def _runs(self, epoch: int, number: int) -> Iterator[tuple[int, int, int]]:
        """Yields runs of windows of one size: position, planned size, number of windows."""
        position = 0
        while position < self.num_samples:
            size, change = self.rule.at(epoch, number)
            left = self.num_samples - position
            count = left // size if self.drop_last else -(-left // size)
            # A change of the size comes before a ragged window only if it is that window's own.
            is_end = change is None or change - number > left // size
            if not is_end and change is not None:
                count = change - number
            if count:
                yield position, size, count
            if is_end:
                return
            number += count
            position += count * size
