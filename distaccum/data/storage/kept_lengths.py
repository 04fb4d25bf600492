"""Lengths of samples that are made of files: measured once, and kept beside the files."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence, Set
from functools import partial
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
        transform: makes the samples; None for nothing. What it has as `lengths_depend_on`, as JSON values, says when
            the lengths are other ones. Of a transform without, it is the numbers and texts in its attributes, and the
            lengths of a few samples, which are loaded at each start.

    Raises:
        UserError: a sample can't be loaded, or has no length.
    """
    of_transform = getattr(transform, "lengths_depend_on", None)
    if transform is not None and of_transform is None:
        of_transform = [_content(transform), lengths_of_some(dataset)]
    path = made_once(
        sources, "lengths", lambda file: _write(file, dataset), depends_on=[depends_on, len(dataset), of_transform]
    )
    found: NDArray[np.int32] = Mapped(path, torch.int32).array
    return found


def _content(value: Any, depth: int = 4) -> Any:
    """Returns what is the same of an object in every process, as JSON values: its class, and the numbers and texts in
    its attributes, in the lists and sets there and in the attributes of objects there, to a depth.

    A pickle of it would not do: the order of a set of texts is another one in each process.
    """
    if value is None or isinstance(value, int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_content(entry, depth) for entry in value]
    if isinstance(value, Mapping | Set):
        entries = value.items() if isinstance(value, Mapping) else value
        return sorted(json.dumps(_content(entry, depth)) for entry in entries)
    if isinstance(value, partial):
        return _content([value.func, value.args, value.keywords], depth)
    if inspect.isroutine(value) or inspect.isclass(value):
        return f"{getattr(value, '__module__', '')}.{value.__qualname__}"
    attributes = _content(vars(value), depth - 1) if depth and hasattr(value, "__dict__") else None
    return [_content(type(value)), attributes]


def _write(file: BinaryIO, dataset: Any) -> str:
    least, most = 0, 0
    for first, lengths in measured(dataset):
        file.seek(4 * first)
        file.write(lengths.tobytes())
        least, most = min(least or lengths.min(), lengths.min()), max(most, lengths.max())
    return f"{len(dataset):,} samples of {least:,} to {most:,}"
