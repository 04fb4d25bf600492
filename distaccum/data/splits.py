"""The two parts that each reference dataset has, and which samples of one sequence belong to which."""

from __future__ import annotations

from fractions import Fraction
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from distaccum.errors import UserError, require

TRAIN = "train"
EVALUATION = "evaluation"
_MOST_PARTS = 10**6
Numbers = TypeVar("Numbers", int, NDArray[np.int64])


def check_split(split: str, dataset: str) -> None:
    """Raises a `UserError` unless `split` is one of the two; `dataset` is the name that the message gives."""
    if split not in (TRAIN, EVALUATION):
        raise UserError(f"{dataset}: split={split!r} is not known. Give {TRAIN!r} or {EVALUATION!r}.")


class HeldOut:
    """Blocks of consecutive samples that are held out for evaluation, spread evenly; the first one always is.

    Block b is held out where ceil((b + 1) · fraction) > ceil(b · fraction). So it follows from a sample's number alone,
    whatever comes after it, and both counting and finding the i-th sample of a part are arithmetic.

    Args:
        fraction: of the blocks, in [0, 1); 0 for none. Taken to the nearest fraction of a denominator up to 10^6.
        block: samples of a block.

    Raises:
        UserError: the fraction lies outside.
    """

    def __init__(self, fraction: float, block: int = 1) -> None:
        if not 0 <= fraction < 1:
            raise UserError(f"data.evaluation_fraction={fraction} must lie in [0, 1).")
        self._part, self._whole = Fraction(fraction).limit_denominator(_MOST_PARTS).as_integer_ratio()
        self._block = block

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._part}/{self._whole}, block={self._block})"

    def count(self, total: int, split: str) -> int:
        """Returns how many of the first `total` samples belong to a part."""
        blocks, rest = divmod(total, self._block)
        before, after = (-(-number * self._part // self._whole) for number in (blocks, blocks + 1))
        held_out = before * self._block + (rest if after > before else 0)
        return held_out if split == EVALUATION else total - held_out

    def required(self, total: int, split: str) -> int:
        """Returns `count`.

        Raises:
            UserError: there are samples, and the part has none of them.
        """
        count = self.count(total, split)
        require(
            count > 0 or total == 0,
            f"data.evaluation_fraction={self._part / self._whole:g} of {total:,} samples leaves none for the {split}. "
            "Set another one, give data of its own for the evaluation, or set data.evaluation=null.",
        )
        return count

    def place(self, index: Numbers, split: str) -> Numbers:
        """Returns the number of the sample that is the `index`-th of a part; of an array, those of all."""
        number, within = index // self._block, index % self._block
        if split == EVALUATION:
            block = number * self._whole // self._part
        else:
            block = -(-(number + 1) * self._whole // (self._whole - self._part)) - 1
        return block * self._block + within

    def contains(self, first: int, count: int) -> NDArray[np.bool_]:
        """Returns for each of `count` blocks from `first` on whether it is held out."""
        up_to = -(-np.arange(first, first + count + 1) * self._part // self._whole)
        return up_to[1:] > up_to[:-1]
