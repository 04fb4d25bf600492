"""What windows add up besides gradients, in one process. On several ranks: tests/distributed/checks_sums.py."""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distaccum import Accumulator, UpdateResult, UserError


def _update(outputs: list[tuple[Any, dict[str, Tensor]]], **options: Any) -> UpdateResult:
    """One window, each micro-step of which has a weight and sums; each micro-batch has 2 samples of 1."""
    model = nn.Linear(1, 1)
    accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)
    with accumulator.window(outputs) as micro_batches:
        for weight, sums in micro_batches:
            accumulator.backward(model(torch.ones(2, 1)).sum(), weight, sums)
    return accumulator.step()


@pytest.mark.parametrize(
    ("weight", "got"),
    [
        (torch.ones(2), r"got shape \(2,\)"),
        (torch.ones(1), r"got shape \(1,\)"),
        (-1, "got -1"),
        (math.inf, "got inf"),
        (math.nan, "got nan"),
        (np.float32(-2), r"got -2\.0"),
    ],
)
def test_what_can_be_no_weight_is_refused_at_once(weight: Any, got: str) -> None:
    with pytest.raises(UserError, match=f"weight must be a scalar tensor, or a finite number of at least 0; {got}"):
        _update([(weight, {})])


@pytest.mark.parametrize("wrong", [math.inf, -math.inf, math.nan, -1.0])
@pytest.mark.parametrize("others", [5.0, torch.tensor(5)])
def test_a_weight_on_the_device_is_looked_at_when_the_window_ends(wrong: float, others: Any) -> None:
    """A negative one too, though the window's total is above zero; and none passes for an update of zero gradient."""
    outputs: list[Any] = [(others, {}), (torch.tensor(wrong, dtype=torch.float16), {}), (others, {})]
    with pytest.raises(UserError, match=r"update 1: a weight is negative, infinite or NaN \(rank 0, micro-step 2\)"):
        _update(outputs)
    assert _update(outputs, skip_nonfinite=True).skipped


def test_whole_numbers_are_added_up_exactly_whatever_is_beside_them() -> None:
    large = 2**24 + 1  # which float32 rounds
    formats = [torch.int64, torch.float32, torch.int32, torch.bool]
    values = [torch.tensor(number, dtype=dtype) for number, dtype in zip((large, 1, large, 1), formats, strict=True)]
    update = _update([(value, {"count": value}) for value in values] + [(1, {"count": torch.tensor(1)})])
    assert update.weight == update.sums["count"] == 2 * large + 3


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({}, r"sums\['b'\] came in 1 of 2 micro-steps"),
        ({"a": torch.ones(()), "b": torch.ones(3)}, r"sums\['b'\] came in 2 of 2 .* shapes \[\(2,\), \(3,\)\]"),
        ({"a": torch.ones(()), "b": torch.ones(2), "c": torch.ones(2)}, r"sums\['c'\] came in 1 of 2"),
    ],
)
def test_sums_are_the_same_in_each_micro_step(second: dict[str, Tensor], said: str) -> None:
    with pytest.raises(UserError, match=said):
        _update([(1, {"b": torch.ones(2), "a": torch.ones(())}), (1, second)])


def test_sums_keep_the_order_in_which_they_came() -> None:
    assert list(_update([(1, {"b": torch.ones(2), "a": torch.ones(0)})]).sums) == ["b", "a"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64])
def test_sums_are_added_up_as_they_come(dtype: torch.dtype) -> None:
    """A window keeps none of the tensors it is given: neither their memory nor a view of it."""
    model = nn.Linear(1, 1)
    accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1))
    given: list[weakref.ref[Tensor]] = []
    reused = torch.zeros(3, dtype=dtype)
    with accumulator.window(range(4)) as micro_batches:
        for number in micro_batches:
            assert all(tensor() is None for tensor in given)
            value = torch.full((2, 2), number, dtype=dtype)
            given.append(weakref.ref(value))
            reused += 1
            accumulator.backward(model(torch.ones(2, 1)).sum(), 1, {"own": value, "reused": reused})
            del value
    sums = accumulator.step().sums
    assert sums["own"].tolist() == [[6.0, 6.0]] * 2
    assert sums["reused"].tolist() == [1.0 + 2 + 3 + 4] * 3
    assert reused.tolist() == [4] * 3, "the caller's tensor is as it was"
    assert {value.dtype for value in sums.values()} == {torch.float64}
