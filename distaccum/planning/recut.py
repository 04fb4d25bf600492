"""Cuts micro-batches smaller once they have not fitted into memory.

Sizes are in samples, or in tokens where the samples' lengths are known: with padding, or without where samples are
packed. Indices in, indices out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distaccum.planning.batch_plan import split_evenly
from distaccum.planning.lengths import SampleLengths
from distaccum.planning.packed import cut_packed

Lengths = SampleLengths | NDArray[np.int64]


def size_of(samples: Sequence[int], lengths: Lengths | None, is_packed: bool = False) -> int:
    """Returns a micro-batch's size: its samples; or with `lengths` (of all samples) its tokens, padding included."""
    if lengths is None or not samples:
        return len(samples)
    own = lengths[list(samples)]
    return int(own.sum()) if is_packed else len(samples) * int(own.max())


def size_of_half(samples: Sequence[int], lengths: Lengths | None, is_packed: bool = False) -> int:
    """Returns the size that half a micro-batch may have, wherever its longest sample ends up."""
    size = size_of(samples, lengths, is_packed)
    if is_packed and lengths is not None:
        return max(1, size // 2)
    return size // max(1, len(samples)) * ((len(samples) + 1) // 2)


def recut(
    pieces: Sequence[Sequence[int]], limit: int, lengths: Lengths | None, is_packed: bool = False
) -> list[list[int]]:
    """Cuts a rank's micro-batches of one window, so that none is larger than the limit unless it is a single sample.

    Without lengths the rank's samples are dealt out anew, evenly and in order; with them, only what is too large is
    cut.
    """
    if all(size_of(piece, lengths, is_packed) <= limit for piece in pieces):
        return [list(piece) for piece in pieces]
    if lengths is None:
        samples = [sample for piece in pieces for sample in piece]
        count = max(len(pieces), -(-len(samples) // limit))
        sizes = split_evenly(len(samples), min(count, len(samples)))
        ends = np.cumsum(sizes).tolist()
        return [samples[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    split = _split_packed if is_packed else _split_padded
    return [part for piece in pieces for part in split(piece, limit, lengths)]


def _split_padded(samples: Sequence[int], limit: int, lengths: Lengths) -> list[list[int]]:
    # Shortest first, as the costliest micro-step comes last in its window.
    rest = sorted(samples, key=lambda sample: -int(lengths[sample]))
    parts: list[list[int]] = []
    while rest:
        fits = max(1, limit // int(lengths[rest[0]]))
        parts.append(rest[:fits])
        rest = rest[fits:]
    return parts[::-1]


def _split_packed(samples: Sequence[int], limit: int, lengths: Lengths) -> list[list[int]]:
    if size_of(samples, lengths, is_packed=True) <= limit or not samples:
        return [list(samples)]
    (steps,) = cut_packed(lengths[list(samples)], world_size=1, max_tokens=limit)
    return [[samples[place] for place in step] for step in steps]
