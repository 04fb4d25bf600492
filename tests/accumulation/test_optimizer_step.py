"""Gradients between windows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distaccum import Accumulator, UserError

BATCHES = [torch.ones(size, 2) for size in (3, 1)]


def _accumulator(model: nn.Module, *parameters: Tensor) -> Accumulator:
    return Accumulator(model, torch.optim.SGD(list(parameters) or list(model.parameters()), lr=0.1))


def _train(model: nn.Module, accumulator: Accumulator) -> Tensor:
    """Gives the weight after it."""
    with accumulator.window(BATCHES) as micro_batches:
        for batch in micro_batches:
            accumulator.backward(model(batch).sum(), len(batch))
    accumulator.step()
    weight = model.weight
    assert isinstance(weight, Tensor)
    return weight.detach().clone()


def test_a_window_keeps_its_gradients_from_other_accumulators_of_its_parameters() -> None:
    """One that is made while it is open, or opens a window of its own; others are none of its business."""
    model, twin, elsewhere = nn.Linear(2, 1), nn.Linear(2, 1), nn.Linear(2, 1)
    twin.load_state_dict(model.state_dict())
    first, second = _accumulator(model), _accumulator(nn.Linear(2, 1), model.weight)
    refused = pytest.raises(UserError, match="another Accumulator of some of the same parameters has a window open")
    with first.window(BATCHES) as micro_batches:
        for batch in micro_batches:
            first.backward(model(batch).sum(), len(batch))
            with refused:
                _accumulator(nn.Linear(2, 1), model.weight)
            with refused, second.window(BATCHES):
                pass
            _train(elsewhere, _accumulator(elsewhere))
    with refused:
        _accumulator(model)
    first.step()
    assert torch.equal(model.weight, _train(twin, _accumulator(twin)))
    _train(model, _accumulator(model))


def test_a_window_whose_step_never_came_can_be_dropped() -> None:
    model, twin = nn.Linear(2, 1), nn.Linear(2, 1)
    twin.load_state_dict(model.state_dict())
    accumulator = _accumulator(model)
    with accumulator.window(BATCHES) as micro_batches:
        for batch in micro_batches:
            accumulator.backward(model(batch).sum(), len(batch))
    with pytest.raises(RuntimeError, match="nor dropped by clear_gradients"):
        _train(model, accumulator)
    accumulator.clear_gradients()
    assert torch.equal(_train(model, accumulator), _train(twin, _accumulator(twin)))
    assert accumulator.updates == 1


def test_sparse_gradients_are_refused_before_anything_moves() -> None:
    for embedding in (nn.Embedding(3, 2, sparse=True), nn.EmbeddingBag(3, 2, sparse=True)):
        with pytest.raises(UserError, match="sparse=False"):
            _accumulator(nn.Sequential(embedding))
    attention = nn.Linear(2, 1)
    attention.sparse = True  # type: ignore[assignment]
    _train(attention, _accumulator(attention))

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 2))

        def forward(self, batch: Tensor) -> Any:
            return F.embedding(batch.long(), self.weight, sparse=True)

    model = Functional()
    with pytest.raises(UserError, match="sparse=False"):
        _train(model, _accumulator(model))
    assert torch.equal(model.weight, torch.ones(3, 2))
