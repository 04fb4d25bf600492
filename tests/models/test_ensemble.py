from __future__ import annotations

import math
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from distaccum import Ensemble
from distaccum.config.enums import Combination
from distaccum.errors import UserError
from distaccum.models.ensemble import mean_of_weights


class Constant(nn.Module):
    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, inputs: Tensor) -> Tensor:
        return self.output


@given(members=st.integers(1, 5), seed=st.integers(0, 99), dim=st.sampled_from([1, -1]))
def test_probabilities_are_averaged(members: int, seed: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs = [5 * torch.randn(3, 4, 6, generator=generator, dtype=torch.float64) for _ in range(members)]
    found = Ensemble([Constant(output) for output in outputs], class_dim=dim)(torch.zeros(1))
    wanted = torch.stack([output.softmax(dim) for output in outputs]).mean(0)
    assert torch.allclose(found.exp(), wanted, rtol=1e-12)
    # A cross-entropy takes it as logits, and gives minus the logarithm of the averaged probability.
    targets = torch.zeros(found.select(dim, 0).shape, dtype=torch.long)
    loss = F.cross_entropy(found.movedim(dim, 1), targets)
    assert float(loss) == pytest.approx(float(-wanted.select(dim, 0).log().mean()), rel=1e-12)


def test_probabilities_of_half_precision_are_averaged_in_float32() -> None:
    outputs = [torch.tensor([[0.0, 12.0]]).half(), torch.tensor([[12.0, 0.0]]).half()]
    found = Ensemble([Constant(output) for output in outputs], class_dim=1)(torch.zeros(1))
    assert found.dtype is torch.float32
    assert found[0].tolist() == pytest.approx([math.log(0.5)] * 2, rel=1e-6)


def test_outputs_are_averaged() -> None:
    members = [Constant(torch.full((2, 1), value)) for value in (1.0, 4.0)]
    assert Ensemble(members, combine=Combination.outputs)(torch.zeros(1)).tolist() == [[2.5], [2.5]]


def test_members_are_trained_together_as_any_module_is() -> None:
    """Its parameters are those of all members, and gradients come through."""
    ensemble = Ensemble([nn.Linear(2, 3), nn.Linear(2, 3)], class_dim=1)
    ensemble(torch.randn(4, 2)).sum().backward()
    assert len([p for p in ensemble.parameters() if p.grad is not None]) == 4


def test_what_can_not_be_an_ensemble() -> None:
    with pytest.raises(UserError, match="at least one model"):
        Ensemble([], class_dim=1)
    with pytest.raises(UserError, match="needs the dimension of the classes"):
        Ensemble([nn.Linear(1, 1)])
    with pytest.raises(UserError, match="mean_of_weights"):
        Ensemble([nn.Linear(1, 1)], combine=Combination.weights)
    with pytest.raises(UserError, match=r"shapes \[1, 2\] and \[1, 3\]"):
        Ensemble([Constant(torch.zeros(1, 2)), Constant(torch.zeros(1, 3))], class_dim=1)(torch.zeros(1))
    with pytest.raises(UserError, match="needs each model's logits: the model returned a list"):
        Ensemble([Constant([])], combine=Combination.outputs)(torch.zeros(1, 1, 2))


class Named(nn.Module):
    """Gives an object or a mapping with logits and a loss."""

    def __init__(self, logits: Tensor, form: Any) -> None:
        super().__init__()
        self.logits, self.form = logits, form

    def forward(self, inputs: Tensor) -> Any:
        return self.form(logits=self.logits, loss=torch.ones(()))


@pytest.mark.parametrize("form", [SimpleNamespace, dict, OrderedDict])
def test_outputs_with_names_are_put_together_by_their_logits(form: Any) -> None:
    values = [torch.randn(5, 3), torch.randn(5, 3)]
    wanted = Ensemble([Constant(value) for value in values], class_dim=1)(torch.zeros(1))
    found = Ensemble([Named(value, form) for value in values], class_dim=1)(torch.zeros(1))
    assert torch.equal(found.logits, wanted)
    assert torch.equal(found["logits"], wanted)
    assert found.get("loss") is None
    assert not hasattr(found, "loss")
    with pytest.raises(UserError, match="'loss' is asked for"):
        found["loss"]
    with pytest.raises(UserError, match="'loss' is asked for"):
        _ = found.loss
    with pytest.raises(UserError, match="0 is asked for"):
        found[0]


class _Fields(NamedTuple):
    """Like transformers' `ModelOutput`, whose entries have numbers too."""

    logits: Tensor
    loss: Tensor


def test_an_output_s_first_entry_is_the_ensemble_s_too() -> None:
    values = [torch.randn(5, 3), torch.randn(5, 3)]
    wanted = Ensemble([Constant(value) for value in values], class_dim=1)(torch.zeros(1))
    found = Ensemble([Named(value, _Fields) for value in values], class_dim=1)(torch.zeros(1))
    assert torch.equal(found[0], wanted)
    assert torch.equal(found.logits, wanted)
    pairs: list[Any] = [(value, torch.ones(())) for value in values]
    (found,) = Ensemble([Constant(pair) for pair in pairs], class_dim=1)(torch.zeros(1))
    assert torch.equal(found, wanted)


def _network(seed: int, width: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
    network(torch.randn(8, 3))  # statistics
    return network.eval()


def test_weights_are_averaged() -> None:
    members = [_network(seed) for seed in range(3)]
    mixed = mean_of_weights(members).state_dict()
    for name, value in mixed.items():
        if value.is_floating_point():
            wanted = torch.stack([member.state_dict()[name].double() for member in members]).mean(0)
            assert torch.allclose(value.double(), wanted, rtol=1e-7, atol=1e-9), name
    assert not torch.equal(mixed["0.weight"], members[0].state_dict()["0.weight"])
    assert int(mixed["1.num_batches_tracked"]) == 1
    assert torch.equal(members[0].state_dict()["0.weight"], _network(0).state_dict()["0.weight"]), "left as it was"
    with pytest.raises(UserError, match=r"models 1 and 3 can't be combined: 0\.bias"):
        mean_of_weights([*members[:2], _network(0, width=5)])
