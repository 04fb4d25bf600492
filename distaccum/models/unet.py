"""A small U-Net for segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from distaccum.errors import UserError
from distaccum.models.checks import require_at_least_one, require_sample_shape
from distaccum.models.cnn import CHANNELS_PER_GROUP


class UNet(nn.Module):
    """A U-Net (Ronneberger et al. 2015): down and up again, with what each stage saw handed across.

    Two 3×3 convolutions with GroupNorm and ReLU per stage; halved by maxima on the way down, doubled by transposed
    convolutions on the way up. GroupNorm and not BatchNorm: its statistics are of one sample, so the result does not
    depend on how a window is cut into micro-batches.

    Args:
        input_shape: channels, height and width of one image; height and width must be divisible by two for each stage
            below the first.
        num_classes: number of classes of a pixel.
        channels: channels of each stage from the top down, multiples of 8.

    Raises:
        UserError: an impossible argument.
    """

    def __init__(self, *, input_shape: Sequence[int], num_classes: int, channels: Sequence[int] = (16, 32, 64)) -> None:
        super().__init__()
        require_at_least_one("UNet", input_shape=input_shape, num_classes=num_classes, channels=channels)
        if len(input_shape) != 3:
            raise UserError(f"UNet: input_shape={list(input_shape)} must be channels, height and width.")
        if len(channels) == 0 or any(number % CHANNELS_PER_GROUP for number in channels):
            raise UserError(
                f"UNet: channels={list(channels)} must be one or more multiples of {CHANNELS_PER_GROUP}, "
                "the size of a group of GroupNorm."
            )
        factor = 2 ** (len(channels) - 1)
        if input_shape[1] % factor or input_shape[2] % factor:
            raise UserError(
                f"UNet: images of {input_shape[1]}×{input_shape[2]} can't be halved {len(channels) - 1} times, once "
                f"between {len(channels)} stages. Give sides divisible by {factor}, or fewer model.channels."
            )
        self.input_shape = tuple(input_shape)
        before = [input_shape[0], *channels]
        self.down = nn.ModuleList(_stage(a, b) for a, b in zip(before, channels, strict=False))
        pairs = list(pairwise(channels))
        self.doubling = nn.ModuleList(
            nn.ConvTranspose2d(below, above, kernel_size=2, stride=2) for above, below in reversed(pairs)
        )
        self.up = nn.ModuleList(_stage(2 * above, above) for above, _ in reversed(pairs))
        self.halving = nn.MaxPool2d(2)
        self.classifier = nn.Conv2d(channels[0], num_classes, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, num_classes, H, W]` of images `[B, *input_shape]`."""
        require_sample_shape("UNet", self.input_shape, images.shape)
        seen: list[Tensor] = []
        hidden = images
        for stage in self.down:
            hidden = stage(self.halving(hidden) if seen else hidden)
            seen.append(hidden)
        for doubling, stage, across in zip(self.doubling, self.up, reversed(seen[:-1]), strict=True):
            hidden = stage(torch.cat([across, doubling(hidden)], dim=1))
        logits: Tensor = self.classifier(hidden)
        return logits


def _stage(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (before, after):
        layers += [
            nn.Conv2d(channels, after, kernel_size=3, padding=1, bias=False),  # GroupNorm has the bias
            nn.GroupNorm(after // CHANNELS_PER_GROUP, after),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)
