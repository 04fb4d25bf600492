from __future__ import annotations

import torch
from rebinding import Rebinding
from torch import nn

from distaccum.runtime.buffers import KeptBuffers


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
