from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distaccum.config.components import CNNConfig
from distaccum.data import Digits
from distaccum.errors import UserError
from distaccum.models import CNN
from distaccum.training.model import build_model


@pytest.mark.parametrize("input_shape", [(1, 1, 1), (1, 8, 8), (3, 5, 7), (3, 9, 2), (3, 33, 64)])
@pytest.mark.parametrize("channels", [[8], [8, 16], [8, 16, 24, 32]])
def test_any_size_of_image(input_shape: tuple[int, int, int], channels: list[int]) -> None:
    model = CNN(input_shape=input_shape, num_classes=7, channels=channels)
    logits = model(torch.randn(2, *input_shape))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_every_pixel_counts() -> None:
    model = CNN(input_shape=(1, 5, 7), num_classes=3, channels=[8]).double()
    image = torch.randn(1, 1, 5, 7, dtype=torch.float64, requires_grad=True)
    model(image).square().sum().backward()
    assert image.grad is not None
    assert (image.grad != 0).all()


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    model = CNN(input_shape=(1, 8, 8), num_classes=10).double()
    assert not [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    images = torch.randn(6, 1, 8, 8, dtype=torch.float64)
    apart = torch.cat([model(image) for image in images.split(1)])
    assert torch.allclose(model(images), apart, rtol=0, atol=1e-12)


def test_it_learns_digits() -> None:
    torch.manual_seed(0)
    train, evaluation = Digits("train"), Digits("evaluation")
    model = CNN(input_shape=train.input_shape, num_classes=train.num_classes, channels=[16, 32])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(6):
        for chosen in torch.randperm(len(train)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(train.images[chosen]), train.labels[chosen]).backward()
            optimizer.step()
    accuracy = (model(evaluation.images).argmax(dim=1) == evaluation.labels).double().mean().item()
    assert accuracy > 0.95


def test_the_configured_section_fits() -> None:
    model = build_model(CNNConfig(input_shape=[1, 8, 8], num_classes=10), None)
    assert isinstance(model, CNN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": [8, 12]}, r"channels=\[8, 12\] must be one or more multiples of 8"),
        ({"channels": []}, r"channels=\[\] must be"),
        ({"channels": [0]}, r"channels=\[0\] is impossible"),
        ({"input_shape": [64]}, r"input_shape=\[64\] must be channels, height and width"),
        ({"num_classes": 0}, "num_classes=0 is impossible"),
        ({"dropout": -0.1}, "dropout=-0.1 must lie in"),
    ],
)
def test_impossible_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"CNN: {message}"):
        CNN(**{"input_shape": (1, 8, 8), "num_classes": 2, **change})


def test_images_of_another_shape() -> None:
    with pytest.raises(UserError, match=r"samples of shape \[1, 8, 8\], and got a batch of shape \[2, 1, 9, 9\]"):
        CNN(input_shape=(1, 8, 8), num_classes=10)(torch.zeros(2, 1, 9, 9))
