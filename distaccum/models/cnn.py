"""Small convolutional network."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from distaccum.errors import UserError
from distaccum.models.checks import require_at_least_one, require_probability, require_sample_shape

_CHANNELS_PER_GROUP = 8


def require_images(model: str, input_shape: Sequence[int], channels: Sequence[int]) -> None:
    """Raises a `UserError` unless these are the shape of an image and the channels of a network's stages."""
    if len(input_shape) != 3:
        raise UserError(
            f"{model}: input_shape={list(input_shape)} must be channels, height and width; "
            "for samples that are no images there is model=mlp."
        )
    if len(channels) == 0 or any(number % _CHANNELS_PER_GROUP for number in channels):
        raise UserError(
            f"{model}: channels={list(channels)} must be one or more multiples of {_CHANNELS_PER_GROUP}, "
            "the size of a group of GroupNorm."
        )


def convolution(before: int, after: int) -> list[nn.Module]:
    """Returns a 3×3 convolution, GroupNorm, which has the bias, and ReLU."""
    return [
        nn.Conv2d(before, after, kernel_size=3, padding=1, bias=False),
        nn.GroupNorm(after // _CHANNELS_PER_GROUP, after),
        nn.ReLU(),
    ]


class CNN(nn.Module):
    """One 3×3 convolution, GroupNorm and ReLU per stage, then the mean of each quarter and a linear classifier.

    The means are of quarters, as the place of a stroke matters. The image is halved (2×2 maximum) between stages while
    both sides are at least 2. GroupNorm and not BatchNorm: its statistics are of one sample, so the result does not
    depend on how a window is cut into micro-batches.

    Args:
        input_shape: channels, height and width of one sample.
        num_classes: number of outputs.
        channels: channels of each stage, multiples of 8.
        dropout: dropout before the classifier.

    Raises:
        UserError: an impossible argument.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        num_classes: int,
        channels: Sequence[int] = (32, 64),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require_at_least_one("CNN", input_shape=input_shape, num_classes=num_classes, channels=channels)
        require_probability("CNN", dropout=dropout)
        require_images("CNN", input_shape, channels)
        self.input_shape = tuple(input_shape)
        before, height, width = self.input_shape
        stages: list[nn.Module] = []
        for stage, number in enumerate(channels):
            if stage > 0 and min(height, width) >= 2:
                stages.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
            stages += convolution(before, number)
            before = number
        self.stages = nn.Sequential(*stages)
        # Rounded up: an odd side gives a smaller second part, and nothing is left out.
        quarter = (math.ceil(height / 2), math.ceil(width / 2))
        self.quarters = nn.Sequential(nn.AvgPool2d(quarter, ceil_mode=True), nn.Flatten())
        features = before * min(height, 2) * min(width, 2)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(features, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits `[B, num_classes]` of images `[B, *input_shape]`."""
        require_sample_shape("CNN", self.input_shape, images.shape)
        logits: Tensor = self.classifier(self.quarters(self.stages(images)))
        return logits
