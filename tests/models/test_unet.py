from __future__ import annotations

from typing import Any

import pytest
import torch

from distaccum.config.components import UNetConfig
from distaccum.errors import UserError
from distaccum.models import UNet
from distaccum.training.model import build_model


@pytest.mark.parametrize(("shape", "channels"), [((1, 4, 4), [8]), ((3, 8, 12), [8, 16]), ((1, 16, 8), [8, 16, 24])])
def test_a_class_for_each_pixel(shape: tuple[int, int, int], channels: list[int]) -> None:
    model = UNet(input_shape=shape, num_classes=5, channels=channels)
    logits = model(torch.randn(2, *shape))
    assert logits.shape == (2, 5, *shape[1:])
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_each_stage_saw_is_handed_across() -> None:
    """With what comes from below taken away, a pixel still depends on its neighbours."""
    model = UNet(input_shape=(1, 8, 8), num_classes=2, channels=[8, 16]).double()
    for parameter in model.doubling.parameters():
        torch.nn.init.zeros_(parameter)
    image = torch.randn(1, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    model(image)[0, 0, 4, 4].backward()
    assert image.grad is not None
    assert image.grad[0, 0, 4, 4] != 0


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    model = UNet(input_shape=(1, 8, 8), num_classes=2, channels=[8, 16]).double()
    images = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    apart = torch.cat([model(image) for image in images.split(1)])
    assert torch.allclose(model(images), apart, rtol=0, atol=1e-12)


def test_the_configured_section_fits() -> None:
    assert isinstance(build_model(UNetConfig(input_shape=[1, 8, 8], num_classes=2), None), UNet)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": [8, 12]}, r"channels=\[8, 12\] must be one or more multiples of 8"),
        ({"input_shape": [1, 6, 8], "channels": [8, 8, 8]}, "6×8 can't be halved 2 times.*divisible by 4"),
        ({"input_shape": [8, 8]}, "channels, height and width"),
        ({"num_classes": 0}, "num_classes=0 is impossible"),
    ],
)
def test_impossible_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        UNet(**{"input_shape": [1, 8, 8], "num_classes": 2, "channels": [8, 8], **change})
