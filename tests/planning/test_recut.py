from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distaccum.planning.recut import recut, size_of, size_of_half


@given(st.lists(st.integers(0, 12), min_size=1, max_size=6), st.integers(1, 12), st.booleans())
def test_nothing_is_lost_and_nothing_is_too_large(sizes: list[int], limit: int, by_length: bool) -> None:
    total = sum(sizes)
    lengths = np.array([1 + (7 * index) % 5 for index in range(total)], dtype=np.int64) if by_length else None
    ends = np.cumsum(sizes).tolist()
    pieces = [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    found = recut(pieces, limit, lengths)
    assert sorted(sample for piece in found for sample in piece) == list(range(total))
    assert all(len(piece) <= 1 or size_of(piece, lengths) <= limit for piece in found)
    if all(size_of(piece, lengths) <= limit for piece in pieces):
        assert found == pieces


@given(st.lists(st.integers(1, 9), min_size=2, max_size=20), st.booleans())
def test_half_of_what_did_not_fit_is_always_smaller(lengths: list[int], by_length: bool) -> None:
    samples = list(range(len(lengths)))
    known = np.array(lengths, dtype=np.int64) if by_length else None
    limit = size_of_half(samples, known)
    assert limit < size_of(samples, known)
    assert len(recut([samples], limit, known)) >= 2


def test_samples_are_dealt_out_evenly_and_in_order() -> None:
    assert recut([[5, 6, 7], [8, 9, 1, 2]], 3, None) == [[5, 6, 7], [8, 9], [1, 2]]
    assert recut([[]], 3, None) == [[]]
