from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distaccum.tools.check.recording import agree, first_parting, recording
from distaccum.tools.check.stillness import DrawWatch, StillDraws


@pytest.mark.parametrize("layer", [nn.Dropout(0.4), nn.Dropout2d(0.4), nn.Dropout(0.0)], ids=str)
def test_dropout_becomes_the_identity_with_the_identitys_gradient(layer: nn.Module) -> None:
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    with StillDraws():
        found = layer(x)
    found.backward(torch.ones_like(found))
    torch.testing.assert_close(found.detach(), x.detach(), rtol=0, atol=0)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.ones_like(x), rtol=0, atol=0)


def test_dropout_inside_attention_is_gone() -> None:
    query = torch.randn(2, 2, 4, 8, dtype=torch.float64)
    with StillDraws():
        found = F.scaled_dot_product_attention(query, query, query, dropout_p=0.5)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(query, query, query))


def test_noise_becomes_its_mean() -> None:
    with StillDraws():
        assert torch.equal(torch.randn(3), torch.zeros(3))
        assert torch.equal(torch.rand(3), torch.full((3,), 0.5))
        assert torch.equal(torch.empty(3).uniform_(2, 4), torch.full((3,), 3.0))
        assert torch.equal(torch.empty(3).normal_(2, 4), torch.full((3,), 2.0))
        assert torch.equal(torch.bernoulli(torch.full((3,), 0.3)), torch.full((3,), 0.3))
        assert torch.equal(torch.randint(0, 11, (3,)), torch.full((3,), 5))
        assert torch.equal(torch.empty(3).exponential_(4.0), torch.full((3,), 0.25))


def test_who_draws_is_watched() -> None:
    where = "here"
    with DrawWatch(lambda: where) as watch:
        F.dropout(torch.ones(3), 0.5)
        where = "there"
        F.dropout(torch.ones(3), 0.0)
        torch.ones(3) + 1
    assert watch.modules == ["here"]


class _Steps(nn.Module):
    def __init__(self, offset: float) -> None:
        super().__init__()
        self.same = nn.ReLU(inplace=True)
        self.shifts = _Shift(offset)
        self.after = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.shifts(self.same(x)))


class _Shift(nn.Module):
    def __init__(self, offset: float) -> None:
        super().__init__()
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return x + self.offset


def test_the_first_module_that_parts_is_found() -> None:
    calls = []
    for offset in (0.0, 1e-3):
        model = _Steps(offset)
        with recording(model) as recorded:
            model(torch.linspace(-1, 1, 5))
        calls.append(recorded.calls)
    assert [call.name for call in calls[0]] == ["same", "shifts", "after", ""]
    assert first_parting(*calls) == "shifts"
    assert first_parting(*calls, tolerance=1e-2) is None
    assert first_parting(calls[0], calls[0]) is None


def test_agreement_knows_infinities_and_shapes() -> None:
    mask = torch.tensor([0.0, -torch.inf])
    assert agree(mask, mask.clone(), 0.0)
    assert agree(mask, torch.tensor([1e-12, -torch.inf]), 0.0) is False
    assert not agree(torch.zeros(2), torch.zeros(3), 1.0)
    assert not agree(torch.tensor([1, 2]), torch.tensor([1, 3]), 1.0)
