"""A small U-Net for segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from distaccum.errors import UserError
from distaccum.models.checks import require_at_least_one, require_sample_shape
from distaccum.models.cnn import convolution, require_images


class UNet(nn.Module):
    """A U-Net (Ronneberger et al. 2015): down and up again, with skip connections between the stages of one size.

    Two 3×3 convolutions with GroupNorm and ReLU per stage; max pooling halves the image on the way down, transposed
    convolutions double it on the way up. GroupNorm and not BatchNorm: its statistics are of one sample, so the result
    does not depend on how a window is cut into micro-batches.

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
        require_images("UNet", input_shape, channels)
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
        """Returns logits `[B, num_classes, H, W]` of images `[B, *input_shape]`."""
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
    return nn.Sequential(*convolution(before, after), *convolution(after, after))
