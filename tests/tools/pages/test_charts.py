from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distaccum.tools.pages.lines import Axis, Band, Curve, Mark, line_chart
from distaccum.tools.pages.page import render
from distaccum.tools.pages.svg import axis_ticks, short
from distaccum.tools.pages.thinning import moving_median, thinned

values = st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(values, max_size=300), st.integers(2, 60))
def test_thinning_keeps_ends_and_extremes(heights: list[float], most: int) -> None:
    points = [(float(index), height) for index, height in enumerate(heights)]
    kept = thinned(points, most)
    assert kept == sorted(kept, key=lambda point: point[0])
    assert {x for x, _ in kept} <= {x for x, _ in points}
    finite = [y for y in heights if math.isfinite(y)]
    if finite:
        kept_finite = [y for _, y in kept if math.isfinite(y)]
        assert (min(kept_finite), max(kept_finite)) == (min(finite), max(finite))
    if len(finite) < len(heights):
        assert any(not math.isfinite(y) for _, y in kept), "a gap must stay a gap"
    if points:
        assert (kept[0][0], kept[-1][0]) == (points[0][0], points[-1][0])
    assert len(kept) <= max(most, 3 * (most // 2) + 2)


def test_a_median_forgets_a_spike_and_passes_over_gaps() -> None:
    points = [(float(x), 1.0) for x in range(50)]
    points[20] = (20.0, 1e9)
    points[30] = (30.0, math.nan)
    assert {y for _, y in moving_median(points, 5)} == {1.0}
    assert len(moving_median([(float(x), 1.0) for x in range(5000)], 5, most=100)) <= 101


@given(st.floats(1e-12, 1e12), st.floats(1.01, 1e9), st.booleans())
def test_ticks_are_few_and_inside(low: float, factor: float, is_log: bool) -> None:
    high = low * factor
    ticks = axis_ticks(low, high, 5, is_log)
    assert ticks == sorted(set(ticks))
    assert len(ticks) <= 8
    assert all(low * (1 - 1e-6) <= tick <= high * (1 + 1e-6) for tick in ticks)


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (999, "999"), (-1500, "-1.5k"), (1e20, "1e20"), (2e-7, "2e-7")])
def test_numbers_on_axes_are_short(value: float, text: str) -> None:
    assert short(value) == text


def test_a_gap_is_a_gap_and_no_value_leaves_the_chart() -> None:
    curve = Curve(
        "r0", [(1, 1.0), (2, 2.0), (3, math.nan), (4, 3.0), (5, 0.0), (6, 4.0)], "hint", label="a<b", name="a"
    )
    chart = line_chart(
        "what it shows",
        [curve],
        x=Axis(title="update"),
        y=Axis(title="Loss", is_log=True, high=2.0),
        bands=[Band("data", [(1, 1.0, 2.0), (6, 1.0, 3.0)], "band")],
        marks=[Mark(3.0, "here"), Mark(1.5, "target", is_vertical=False)],
    )
    # Two points, a gap, one point alone, a zero that a logarithm can't show, one point alone.
    assert chart.count("<polyline") == 1
    assert chart.count("<circle") == 2
    assert 'aria-label="what it shows"' in chart
    assert 'data-name="a&lt;b"' in chart
    assert "here" in chart
    assert "target" in chart
    width, height = map(float, re.findall(r'viewBox="0 0 (\d+) (\d+)"', chart)[0])
    for x, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)(?=[ \"])", chart.partition("<polyline")[2]):
        assert 0 <= float(x) <= width
        assert 0 <= float(y) <= height
    assert "nan" not in chart


def test_one_point_alone_is_a_chart_too() -> None:
    for value in (0.0, -3.0, 5.0):
        assert "<circle" in line_chart("one", [Curve("r0", [(1, value)], "")], x=Axis(title="x"), y=Axis(title="y"))
    nothing = line_chart("none", [Curve("r0", [], "")], x=Axis(title="x"), y=Axis(title="y", is_log=True))
    assert "<svg" in nothing


def test_what_is_written_on_a_page_is_escaped() -> None:
    page = render("pages/page.html", "pages", "a<b", facts=["<script>"])
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "<title>a&lt;b</title>" in page
