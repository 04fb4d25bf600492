"""Random data of any size, for measurements and tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from distaccum.data.splits import EVALUATION, check_split
from distaccum.errors import UserError


class Synthetic(Dataset[tuple[Tensor, int]]):
    """Normal noise around one random centre per class.

    Sample `i` is a function of `(split, i)` and the arguments alone: the same on every rank, in every worker and after
    every restart, and only the centres are kept in memory. Classes take turns, so that they are balanced.
    Centres and noise have the same scale: the classes are far apart in many dimensions, and overlap in few.

    A sample is a float32 tensor of `input_shape` and its class, an int.

    Args:
        split: `train` or `evaluation`.
        num_samples: samples to train on; the evaluation has a quarter as many, but at least one.
        input_shape: shape of one sample.
        num_classes: number of classes.

    Raises:
        UserError: another split, or a number below 1.
    """

    def __init__(self, split: str, num_samples: int, input_shape: Sequence[int], num_classes: int) -> None:
        check_split(split, type(self).__name__)
        if num_samples < 1 or num_classes < 1 or any(size < 1 for size in input_shape):
            raise UserError(
                f"Synthetic: num_samples={num_samples}, input_shape={list(input_shape)}, num_classes={num_classes}: "
                "each number must be at least 1."
            )
        self.num_samples = max(1, num_samples // 4) if split == EVALUATION else num_samples
        self.input_shape = tuple(input_shape)
        self.num_classes = num_classes
        # Generators use the low 32 bits of a seed, so the streams differ in the remainder and not in high bits: 0 for
        # the centres, 1 for training samples, 2 for evaluation samples.
        self._stream = 2 if split == EVALUATION else 1
        generator = torch.Generator().manual_seed(0)
        self._centres = torch.randn((num_classes, *self.input_shape), generator=generator)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        index = range(self.num_samples)[index]  # IndexError beyond the end; counts negative ones from it
        label = index % self.num_classes
        generator = torch.Generator().manual_seed(3 * index + self._stream)
        return self._centres[label] + torch.randn(self.input_shape, generator=generator), label
