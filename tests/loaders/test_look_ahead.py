from __future__ import annotations

from collections.abc import Iterator

import pytest

from distaccum.loaders.look_ahead import LookAhead


def test_it_shows_what_is_to_come_and_what_was_taken_early() -> None:
    batches = LookAhead(iter("abcdef"), taken_early=1)
    assert batches.shown(0, 2) == ["a", "b"]
    assert [next(batches), next(batches), next(batches)] == ["a", "b", "c"]
    assert batches.shown(2, 3) == ["c", "d", "e"], "the copy to a GPU is one ahead"
    assert list(batches) == ["d", "e", "f"]
    with pytest.raises(RuntimeError, match="before the iteration over their window alone"):
        batches.shown(4, 2)


def test_it_loads_no_more_than_is_shown() -> None:
    loaded = []

    def load() -> Iterator[int]:
        for number in range(9):
            loaded.append(number)
            yield number

    batches = LookAhead(load(), taken_early=0)
    assert batches.shown(0, 3) == [0, 1, 2]
    assert loaded == [0, 1, 2]
    assert [next(batches) for _ in range(4)] == [0, 1, 2, 3]
    assert loaded == [0, 1, 2, 3]
