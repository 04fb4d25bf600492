"""Handwritten digits, from scikit-learn."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from distaccum.data.splits import EVALUATION, check_split
from distaccum.errors import not_importable

EVALUATION_EVERY = 5
"""One sample of each class in so many is held out."""


class Digits(Dataset[tuple[Tensor, Tensor]]):
    """1797 scanned digits of 8×8 pixels, 80 % to train on and 20 % held out.

    The split is stratified and fixed: every fifth image of each class, in the order of the source, is held out. It
    depends neither on the run's seed nor on scikit-learn's random numbers.

    A sample is an image, float32 `[1, 8, 8]` in [0, 1], and its digit, int64 `[]`.

    Source: scikit-learn's `load_digits`, the test part of the UCI "Optical Recognition of Handwritten Digits".

    Args:
        split: `train` or `evaluation`.

    Raises:
        UserError: another split, or scikit-learn is not installed.
    """

    num_classes = 10
    input_shape = (1, 8, 8)

    def __init__(self, split: str) -> None:
        check_split(split, type(self).__name__)
        try:
            from sklearn.datasets import load_digits
        except (ImportError, MemoryError) as error:
            raise not_importable("Digits", "scikit-learn", error) from error
        source = load_digits()
        labels = torch.as_tensor(source.target, dtype=torch.int64)
        held_out = _every_nth_of_each_class(labels, EVALUATION_EVERY, self.num_classes)
        chosen = held_out if split == EVALUATION else ~held_out
        pixels = torch.as_tensor(source.images, dtype=torch.float32).unsqueeze(1) / 16  # grey levels are 0 … 16
        self.images = pixels[chosen]
        self.labels = labels[chosen]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


def _every_nth_of_each_class(labels: Tensor, n: int, num_classes: int) -> Tensor:
    """A mask, bool `[N]`: the first, the (n+1)-th, … sample of each class."""
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(num_classes):
        mask[(labels == label).nonzero().flatten()[::n]] = True
    return mask
