from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from distaccum import UserError
from distaccum.accumulation.micro_batches import with_last


class Batches:
    """Says one length, and has another."""

    def __init__(self, said: int, there: int) -> None:
        self._said, self._there = said, there

    def __len__(self) -> int:
        return self._said

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._there))


def test_each_item_and_whether_it_is_the_last() -> None:
    wanted = [(0, False), (1, False), (2, True)]
    for items in (range(3), Batches(3, 3), iter(range(3))):
        assert list(with_last(items)) == wanted
    assert not list(with_last([]))


@pytest.mark.parametrize(
    ("items", "given", "said"),
    [(Batches(2, 4), 2, "more"), (Batches(3, 2), 2, "are 2"), (Batches(0, 1), 0, "more")],
)
def test_a_length_that_is_not_that_of_the_items_is_refused(items: Any, given: int, said: str) -> None:
    """Instead of micro-steps after the one that has synchronised, which nobody counts."""
    answers = with_last(items)
    assert [next(answers)[0] for _ in range(given)] == list(range(given))
    with pytest.raises(UserError, match=rf"\(a Batches\) have the len\(\) .*{said}"):
        next(answers)
