"""Lengths of samples that are made of files: measured once, and kept beside the files."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from distaccum.data.storage.made_once import Mapped, made_once
from distaccum.loaders.lengths import lengths_of_some, measured


def kept_lengths(dataset: Any, sources: Sequence[str], depends_on: Any, transform: Any) -> NDArray[np.int32]:
    """Returns the lengths of a dataset's samples, mapped into memory: those that were kept, or else measured now.

    They are kept in a file `lengths` (see `made_once`), which one process makes, with workers.

    Args:
        sources: the files that samples are made of.
        depends_on: what else says which samples there are, as JSON values.
        transform: makes the samples; None for nothing. What it has as `identity`, as JSON values, says when the lengths
            are other ones. Of a transform without, it is the content of its attributes, and the lengths of a few
            samples, which are loaded at each start.

    Raises:
        UserError: a sample can't be loaded, or has no length.
    """
    identity = getattr(transform, "identity", None)
    if transform is not None and identity is None:
        identity = [_content(transform), lengths_of_some(dataset)]
    path = made_once(
        sources, "lengths", lambda file: _write(file, dataset), depends_on=[depends_on, len(dataset), identity]
    )
    found: NDArray[np.int32] = Mapped(path, torch.int32).array
    return found


def _content(transform: Any) -> str:
    try:
        return hashlib.blake2b(pickle.dumps(transform)).hexdigest()
    except Exception:  # by code of any kind
        return f"{type(transform).__module__}.{type(transform).__qualname__}"


def _write(file: BinaryIO, dataset: Any) -> str:
    least, most = 0, 0
    for first, lengths in measured(dataset):
        file.seek(4 * first)
        file.write(lengths.tobytes())
        least, most = min(least or lengths.min(), lengths.min()), max(most, lengths.max())
    return f"{len(dataset):,} samples of {least:,} to {most:,}"
