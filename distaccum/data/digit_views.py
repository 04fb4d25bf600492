"""Digits in two random views each, for contrastive learning."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from distaccum.data.digits import Digits

_MAX_DEGREES = 10.0
_MAX_SCALE = 0.1
_MAX_SHIFT = 0.12
"""In halves of the image's side."""
_NOISE = 0.05


class DigitViews(Dataset[tuple[Tensor, Tensor]]):
    """Each of the digits as two random views: turned, scaled, shifted, made noisy.

    Drawn from torch's global generator, which the loader seeds for each sample, in evaluations too. The split is that
    of `Digits`.

    A sample is its views, float32 `[2, 1, 8, 8]`, and the digit, int64 `[]`, which metrics may use.

    Args:
        split: `train` or `evaluation`.

    Raises:
        UserError: another split, or scikit-learn is not installed.
    """

    input_shape = Digits.input_shape
    num_classes = Digits.num_classes

    def __init__(self, split: str) -> None:
        self._digits = Digits(split)

    def __len__(self) -> int:
        return len(self._digits)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self._digits[index]
        return random_views(image, 2), label


def random_views(image: Tensor, count: int) -> Tensor:
    """Random views `[count, C, H, W]` of an image `[C, H, W]`."""
    angle, scale, right, down = torch.rand(4, count) * 2 - 1
    angle = angle * math.radians(_MAX_DEGREES)
    scale = 1 + scale * _MAX_SCALE
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    rows = [cosine, -sine, right * _MAX_SHIFT, sine, cosine, down * _MAX_SHIFT]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(count, 2, 3), [count, *image.shape], align_corners=False)
    views = F.grid_sample(image.expand(count, *image.shape), grid, align_corners=False)
    return views + _NOISE * torch.randn_like(views)
