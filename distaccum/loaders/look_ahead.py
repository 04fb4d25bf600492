"""Shows micro-batches before they are taken."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any


class LookAhead(Iterator[Any]):
    """Passes micro-batches on, and shows those of a window that somebody wants to look at first.

    Args:
        taken_early: how many micro-batches may have been taken before their window begins (the copy to a GPU is one
            ahead): so many of those taken last can still be shown.
    """

    def __init__(self, batches: Iterator[Any], taken_early: int) -> None:
        self._batches = batches
        self._taken: deque[Any] = deque(maxlen=taken_early)
        self._waiting: deque[Any] = deque()
        self._number = 0
        """Of the next one to be taken, from 0."""

    def __next__(self) -> Any:
        batch = self._waiting.popleft() if self._waiting else next(self._batches)
        self._taken.append(batch)
        self._number += 1
        return batch

    def shown(self, first: int, count: int) -> list[Any]:
        """Returns some of the micro-batches, by their numbers from 0; loads those that have not been."""
        while self._number + len(self._waiting) < first + count:
            self._waiting.append(next(self._batches))
        start = first - (self._number - len(self._taken))
        if start < 0:
            raise RuntimeError("micro-batches can be looked at before the iteration over their window alone")
        return [*self._taken, *self._waiting][start : start + count]
