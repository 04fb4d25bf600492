"""Cuts micro-batches smaller once they have not fitted into memory.

Sizes are in samples, or in tokens with padding where the samples' lengths are known. Indices in, indices out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distaccum.planning.batch_plan import split_evenly


def size_of(samples: Sequence[int], lengths: NDArray[np.int64] | None) -> int:
    """Returns a micro-batch's size: its samples; or with `lengths` (of all samples) its tokens, padding included."""
    if lengths is None or not samples:
        return len(samples)
    return len(samples) * int(lengths[list(samples)].max())


def size_of_half(samples: Sequence[int], lengths: NDArray[np.int64] | None) -> int:
    """Returns the size that half a micro-batch may have, wherever its longest sample ends up."""
    return size_of(samples, lengths) // max(1, len(samples)) * ((len(samples) + 1) // 2)


def recut(pieces: Sequence[Sequence[int]], limit: int, lengths: NDArray[np.int64] | None) -> list[list[int]]:
    """Cuts a rank's micro-batches of one window, so that none is larger than the limit unless it is a single sample.

    Without lengths the rank's samples are dealt out anew, evenly and in order; with them, only what is too large is
    cut.
    """
    if all(size_of(piece, lengths) <= limit for piece in pieces):
        return [list(piece) for piece in pieces]
    if lengths is None:
        samples = [sample for piece in pieces for sample in piece]
        count = max(len(pieces), -(-len(samples) // limit))
        sizes = split_evenly(len(samples), min(count, len(samples)))
        ends = np.cumsum(sizes).tolist()
        return [samples[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    return [part for piece in pieces for part in _split_by_tokens(piece, limit, lengths)]


def _split_by_tokens(samples: Sequence[int], limit: int, lengths: NDArray[np.int64]) -> list[list[int]]:
    # Shortest first, as the costliest micro-step comes last in its window.
    rest = sorted(samples, key=lambda sample: -int(lengths[sample]))
    parts: list[list[int]] = []
    while rest:
        fits = max(1, limit // int(lengths[rest[0]]))
        parts.append(rest[:fits])
        rest = rest[fits:]
    return parts[::-1]
