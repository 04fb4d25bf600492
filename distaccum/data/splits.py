"""The two parts that each reference dataset has."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from distaccum.errors import UserError

TRAIN = "train"
EVALUATION = "evaluation"


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
