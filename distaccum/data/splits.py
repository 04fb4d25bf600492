"""The two parts that each reference dataset has, and which samples of one sequence belong to which."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from distaccum.errors import UserError

TRAIN = "train"
EVALUATION = "evaluation"
_MOST_PARTS = 10**6


def check_split(split: str, dataset: str) -> None:
    """Raises a `UserError` unless `split` is one of the two; `dataset` is the name that the message gives."""
    if split not in (TRAIN, EVALUATION):
        raise UserError(f"{dataset}: split={split!r} is not known. Give {TRAIN!r} or {EVALUATION!r}.")


class HeldOut:
    """Divides numbered rows into those of the training and those held out, which are spread evenly over all.

    Which part a row is in, and which row a part's sample is, follows from numbers alone: of a fraction p/q row i is
    held out if ⌊(i + 1)p/q⌋ > ⌊ip/q⌋.

    Args:
        num_rows: of both parts.
        fraction: of the rows to hold out, in [0, 1); counted in millionths.
        split: the part that this is.
    """

    _WHOLE = 10**6

    def __init__(self, num_rows: int, fraction: float, split: str) -> None:
        if not 0 <= fraction < 1:
            raise UserError(f"data.evaluation_fraction={fraction} must lie in [0, 1).")
        self._held_out = round(fraction * self._WHOLE)
        self._is_held_out = split == EVALUATION
        count = num_rows * self._held_out // self._WHOLE
        self.num_samples = count if self._is_held_out else num_rows - count
        """Rows of this part."""
        if self._is_held_out and not count:
            raise UserError(
                f"data.evaluation_fraction={fraction} of {num_rows:,} rows leaves nothing to evaluate on. Set a larger "
                "one, data.evaluation_files, or data.evaluation=null."
            )

    def rows(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the numbers of the rows that are this part's samples, given by their numbers in it."""
        if not self._held_out:
            return samples
        if self._is_held_out:
            return -(-(samples + 1) * self._WHOLE // self._held_out) - 1
        return samples * self._WHOLE // (self._WHOLE - self._held_out)


class HeldOutBlocks:
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

    def count(self, total: int, split: str) -> int:
        """Returns how many of the first `total` samples belong to a part."""
        blocks, rest = divmod(total, self._block)
        before, after = (-(-number * self._part // self._whole) for number in (blocks, blocks + 1))
        held_out = before * self._block + (rest if after > before else 0)
        return held_out if split == EVALUATION else total - held_out

    def place(self, index: int, split: str) -> int:
        """Returns the number of the sample that is the `index`-th of a part."""
        number, within = divmod(index, self._block)
        if split == EVALUATION:
            block = number * self._whole // self._part
        else:
            block = -(-(number + 1) * self._whole // (self._whole - self._part)) - 1
        return block * self._block + within

    def contains(self, first: int, count: int) -> NDArray[np.bool_]:
        """Returns for each of `count` blocks from `first` on whether it is held out."""
        up_to = -(-np.arange(first, first + count + 1) * self._part // self._whole)
        return up_to[1:] > up_to[:-1]
