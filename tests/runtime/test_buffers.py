from __future__ import annotations

import torch
from torch import Tensor, nn

from distaccum.runtime.buffers import KeptBuffers


class Rebinding(nn.Module):
    """Puts another tensor in the place of a buffer in each forward, as people write it."""

    def __init__(self, features: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(features, features)
        self.mean: Tensor
        self.calls: Tensor
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * inputs.detach().mean(0)
        self.calls += 1
        return torch.as_tensor(self.linear(inputs - self.mean))


def test_buffers_that_are_assigned_anew_are_put_back_too() -> None:
    module = nn.Sequential(Rebinding(), nn.BatchNorm1d(3))
    module(torch.randn(4, 3))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    kept = KeptBuffers(module)
    assert kept
    for _ in range(2):
        module(torch.randn(4, 3) + 1)
        assert not torch.equal(module.state_dict()["0.mean"], before["0.mean"])
        kept.put_back()
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_there_may_be_none() -> None:
    assert not KeptBuffers()
    assert not KeptBuffers(nn.Linear(1, 1))
