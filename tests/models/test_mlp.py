from typing import Any

import pytest
import torch
from torch import nn

from distaccum.config.components import MLPConfig
from distaccum.errors import UserError
from distaccum.models import MLP
from distaccum.training.model import build_model


def test_shapes() -> None:
    model = MLP(input_shape=(3, 4, 4), num_classes=7, hidden_sizes=[16, 8], dropout=0.1)
    assert model(torch.zeros(5, 3, 4, 4)).shape == (5, 7)
    sizes = [(layer.in_features, layer.out_features) for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert sizes == [(48, 16), (16, 8), (8, 7)]


def test_no_hidden_layer_is_a_linear_classifier() -> None:
    model = MLP(input_shape=[2], num_classes=3, hidden_sizes=[])
    inputs = torch.randn(4, 2)
    assert torch.allclose(model(2 * inputs) - model(inputs), model(inputs) - model(0 * inputs), atol=1e-6)


def test_the_configured_section_fits() -> None:
    model = build_model(MLPConfig(input_shape=[1, 8, 8], num_classes=10), None)
    assert isinstance(model, MLP)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_sizes": [8, 0]}, r"hidden_sizes=\[8, 0\] is impossible"),
        ({"num_classes": 0}, "num_classes=0 is impossible"),
        ({"input_shape": [0]}, r"input_shape=\[0\] is impossible"),
        ({"dropout": 1.0}, "dropout=1.0 must lie in"),
    ],
)
def test_impossible_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"MLP: {message}"):
        MLP(**{"input_shape": [2], "num_classes": 2, **change})


def test_samples_of_another_shape() -> None:
    with pytest.raises(UserError, match=r"samples of shape \[1, 8, 8\], and got a batch of shape \[2, 64\]"):
        MLP(input_shape=(1, 8, 8), num_classes=10)(torch.zeros(2, 64))
