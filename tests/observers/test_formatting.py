from __future__ import annotations

import doctest
import math
from types import ModuleType

import pytest

from distaccum.observers import early_stopping, formatting


@pytest.mark.parametrize("module", [formatting, early_stopping])
def test_the_examples_in_the_docstrings(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.0000"),
        (-0.5, "-0.5000"),
        (9.99999, "10.0000"),
        (12345.678, "12346"),
        (2.5e7, "2.50e+07"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_numbers_keep_a_narrow_width(value: float, text: str) -> None:
    assert formatting.number(value) == text


def test_a_clock_shows_no_time_that_cannot_be_told() -> None:
    assert formatting.clock(math.inf) == formatting.clock(math.nan) == "-:--:--"
    assert formatting.clock(59.7) == "0:01:00"


def test_references_are_shown_without_a_loss_too() -> None:
    assert (
        formatting.evaluation_text({"accuracy": 0.5}, {"chance": 0.1}) == "accuracy 0.5000, to compare: chance 0.1000"
    )
