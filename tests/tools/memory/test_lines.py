from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from distaccum.tools.memory.lines import PeakLine, sizes_to_measure

moments = st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**6)), min_size=1, max_size=4)


@given(moments, st.integers(1, 64), st.integers(0, 10**9))
def test_the_largest_that_fits_is_the_largest(moments: list[tuple[int, int]], size: int, limit: int) -> None:
    line = PeakLine({n: max(rest + n * each for rest, each in moments) for n in sizes_to_measure(size, 1000)})
    most = line.largest(limit, 256)
    assert most == 0 or line.at(most) <= limit
    assert most == 256 or line.at(most + 1) > limit


@given(moments, st.integers(1, 64))
def test_it_is_never_below_what_is_held_beyond_the_measured_sizes_if_one_moment_rules(
    moments: list[tuple[int, int]], size: int
) -> None:
    rest, each = moments[0]
    line = PeakLine({n: rest + n * each for n in sizes_to_measure(size, 1000)})
    assert line.at(4 * size) == rest + 4 * size * each
    assert line.at(4 * size + 1) - line.at(4 * size) == each


def test_sizes() -> None:
    assert sizes_to_measure(16, 1000) == [4, 8, 16]
    assert sizes_to_measure(1, 1000) == [1, 2]
    assert sizes_to_measure(1, 1) == [1]
    assert sizes_to_measure(64, 3) == [3]
    assert sizes_to_measure(8, 1000, least=4) == [4, 8]
    assert sizes_to_measure(32, 1000, least=4) == [8, 16, 32]
    assert sizes_to_measure(2, 1000, least=4) == [2]
    assert PeakLine({3: 7}).at(100) == 7
