"""Torch's own parameter groups, and clipping by value, in anybody's own loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from distaccum import Accumulator, UpdateResult, UserError

DATA = torch.randn(7, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _model() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(4, 2).double()


def _groups(model: nn.Linear) -> list[dict[str, object]]:
    return [{"params": [model.weight], "lr": 0.1, "name": "weight"}, {"params": [model.bias], "momentum": 0.9}]


def _update(accumulator: Accumulator, model: nn.Module) -> UpdateResult:
    with accumulator.window(DATA.split(3)) as micro_batches:
        for batch in micro_batches:
            accumulator.backward(model(batch).square().sum(), len(batch))
    return accumulator.step()


@pytest.mark.parametrize("clip_value", [None, 0.05])
def test_groups_of_torch_are_taken_as_they_are(clip_value: float | None) -> None:
    model, reference = _model(), _model()
    accumulator = Accumulator(model, torch.optim.SGD(_groups(model), lr=0.5), clip_value=clip_value)
    optimizer = torch.optim.SGD(_groups(reference), lr=0.5)
    for _ in range(3):
        result = _update(accumulator, model)
        (reference(DATA).square().sum() / len(DATA)).backward()
        wanted = {"weight": float(reference.weight.grad.norm()), "1": float(reference.bias.grad.norm())}
        assert result.group_norms == pytest.approx(wanted, rel=1e-12)
        assert result.grad_norm == pytest.approx(math.hypot(*wanted.values()), rel=1e-12)
        if clip_value is not None:
            nn.utils.clip_grad_value_(reference.parameters(), clip_value)
        optimizer.step()
        optimizer.zero_grad()
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=0)


def test_one_group_has_no_norm_of_its_own_and_a_group_without_gradient_has_none() -> None:
    model = _model()
    assert _update(Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1)), model).group_norms == {}
    unused = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = torch.optim.SGD([{"params": model.parameters()}, {"params": [unused]}], lr=0.1)
    result = _update(Accumulator(model, optimizer), model)
    assert result.group_norms == {"0": result.grad_norm, "1": 0.0}


def test_two_ways_of_clipping_are_refused() -> None:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match=r"clip_norm=1.0 and clip_value=0.5 would clip the gradient twice"):
        Accumulator(model, optimizer, clip_norm=1.0, clip_value=0.5)
    with pytest.raises(UserError, match=r"clip_value=0.0 is impossible"):
        Accumulator(model, optimizer, clip_value=0.0)
