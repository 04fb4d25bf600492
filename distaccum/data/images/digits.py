"""Handwritten digits, from scikit-learn; and two random views of each, for contrastive learning."""

from __future__ import annotations

import gzip
import math
import zlib
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from distaccum.data.splits import EVALUATION, check_split
from distaccum.errors import UserError, not_importable

_EVALUATION_EVERY = 5
"""Of each class, one sample in this many is held out."""
_MAX_DEGREES = 10.0
_MAX_SCALE = 0.1
_MAX_SHIFT = 0.12
"""Largest shift, in halves of the image's side."""
_NOISE = 0.05


class Digits(Dataset[tuple[Tensor, Tensor]]):
    """1797 scanned digits of 8×8 pixels, 80 % to train on and 20 % held out.

    The split is stratified and fixed: every fifth image of each class, in the order of the source, is held out. It
    depends neither on the run's seed nor on scikit-learn's random numbers.

    A sample is an image, float32 `[1, 8, 8]` in [0, 1], and its digit, int64 `[]`.

    Source: the file behind scikit-learn's `load_digits`, the test part of the UCI "Optical Recognition of Handwritten
    Digits". It is read without importing scikit-learn, which would take each rank more than a second.

    Args:
        split: `train` or `evaluation`.

    Raises:
        UserError: another split, or scikit-learn is not installed, or does not hold the digits.
    """

    num_classes = 10
    input_shape = (1, 8, 8)

    def __init__(self, split: str) -> None:
        check_split(split, type(self).__name__)
        source = _source()
        labels = source[:, -1].long()
        held_out = torch.zeros(len(labels), dtype=torch.bool)
        for label in range(self.num_classes):
            held_out[(labels == label).nonzero().flatten()[::_EVALUATION_EVERY]] = True
        chosen = held_out if split == EVALUATION else ~held_out
        pixels = source[:, :-1].view(-1, *self.input_shape) / 16  # grey levels are 0 … 16
        self.images = pixels[chosen]
        self.labels = labels[chosen]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


class DigitViews(Dataset[tuple[Tensor, Tensor]]):
    """Each of the digits as two random views: turned, scaled, shifted, made noisy.

    The views are drawn from torch's global generator, which the loader seeds for each sample, in evaluations too. The
    split is that of `Digits`.

    A sample is its views, float32 `[2, 1, 8, 8]`, and the digit, int64 `[]`, which metrics may use.

    Args:
        split: `train` or `evaluation`.

    Raises:
        UserError: another split, or scikit-learn is not installed, or does not hold the digits.
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


def _source() -> Tensor:
    """Returns a row of 64 grey levels and the digit for each image, float32 `[1797, 65]`, in the order of scikit-learn.

    Raises:
        UserError: scikit-learn is not installed, or does not hold the digits where it always has.
    """
    package = find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise not_importable("Digits", "scikit-learn", ModuleNotFoundError("No module named 'sklearn'"))
    file = Path(package.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    try:
        with gzip.open(file, "rt", encoding="ascii") as lines:
            values = torch.tensor([[float(entry) for entry in line.split(",")] for line in lines])
        if values.shape != (1797, 65):
            raise ValueError(f"its table is {list(values.shape)}, not [1797, 65]")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(
            f"Digits reads scikit-learn's file {file}, which can't be read: {error}. Install scikit-learn again, "
            "1.5 or later."
        ) from error
    return values


def random_views(image: Tensor, count: int) -> Tensor:
    """Draws random views `[count, C, H, W]` of an image `[C, H, W]`."""
    angle, scale, right, down = torch.rand(4, count) * 2 - 1
    angle = angle * math.radians(_MAX_DEGREES)
    scale = 1 + scale * _MAX_SCALE
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    rows = [cosine, -sine, right * _MAX_SHIFT, sine, cosine, down * _MAX_SHIFT]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(count, 2, 3), [count, *image.shape], align_corners=False)
    views = F.grid_sample(image.expand(count, *image.shape), grid, align_corners=False)
    return views + _NOISE * torch.randn_like(views)
