"""How long each sample of a dataset is."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from distaccum.devices import tensors_of
from distaccum.errors import UserError
from distaccum.logs import console


def lengths_of(dataset: Any) -> NDArray[np.int64]:
    """The dataset's attribute `lengths`, or what loading every sample once shows, with a progress bar.

    The length of a sample is the largest first dimension of its tensors that have one.

    Raises:
        UserError: a sample has no tensor with a first dimension, or `lengths` are not numbers.
    """
    known = getattr(dataset, "lengths", None)
    if known is not None:
        try:
            return np.asarray(known, dtype=np.int64)
        except (TypeError, ValueError) as error:
            raise UserError(f"batch=by_length: the dataset's `lengths` are not whole numbers: {error}.") from error
    indices = track(range(len(dataset)), "lengths of the samples", console=console, transient=True)
    return np.array([_length(dataset[index], index) for index in indices], dtype=np.int64)


def _length(sample: Any, index: int) -> int:
    sizes = [len(tensor) for tensor in tensors_of(sample) if isinstance(tensor, Tensor) and tensor.ndim > 0]
    if not sizes:
        raise UserError(
            f"batch=by_length: sample {index} has no tensor with a first dimension, so its length is not known. Give "
            "the dataset an attribute `lengths`, one number for each sample; or set batch=uniform."
        )
    return max(sizes)
