"""Orders an epoch's samples by a permutation that can be evaluated at any position."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_FEISTEL_ROUNDS = 8
_FEW = 16
"""Positions for which it is faster to do without numpy."""
_64_BITS = (1 << 64) - 1
ENDLESS = 2**52
"""The number of samples of an epoch that doesn't end: more than anybody reads, and exact as a float."""


def shuffled(
    positions: Sequence[int] | NDArray[np.int64], num_samples: int, seed: int, epoch: int
) -> NDArray[np.int64]:
    """Returns the samples at positions of an epoch's random order.

    The order is a permutation of `range(num_samples)`, evaluated only where it is asked for: a rank computes the
    samples of its own micro-batches and no others, and a resumed run jumps to any update at once. It is defined here
    and not by a library's generator, so it is the same with every version of everything.

    A Feistel network over the smallest square power of two that holds all positions (Luby and Rackoff 1988), walked
    until it lands inside `range(num_samples)` (Black and Rogaway 2002); its round function is splitmix64's finaliser
    (Steele, Lea and Flood 2014).

    Args:
        positions: integers from 0 to `num_samples - 1`.

    Returns:
        int64 array of the same length.
    """
    half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * _FEISTEL_ROUNDS).digest()
    keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    if len(positions) <= _FEW:
        numbers, plain_keys = np.asarray(positions, dtype=np.int64).tolist(), keys.tolist()
        return np.array([_walked(value, num_samples, half_bits, plain_keys) for value in numbers], dtype=np.int64)
    values = _feistel(np.asarray(positions, dtype=np.uint64), half_bits, keys)
    outside = np.flatnonzero(values >= num_samples)
    while outside.size:
        values[outside] = _feistel(values[outside], half_bits, keys)
        outside = outside[values[outside] >= num_samples]
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half_bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits, mask, top = np.uint64(half_bits), np.uint64((1 << half_bits) - 1), np.uint64(64 - half_bits)
    left, right = values >> bits, values & mask
    for key in keys:
        mixed = right + key
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        # The top bits are the best mixed ones.
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) >> top)
    return (left << bits) | right


def _walked(value: int, num_samples: int, half_bits: int, keys: list[int]) -> int:
    """Does the same for one position in 20 microseconds; numpy's calls take a third of a millisecond for any number."""
    mask, top = (1 << half_bits) - 1, 64 - half_bits
    while True:
        left, right = value >> half_bits, value & mask
        for key in keys:
            mixed = (right + key) & _64_BITS
            mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _64_BITS
            left, right = right, left ^ ((mixed ^ (mixed >> 31)) >> top)
        value = (left << half_bits) | right
        if value < num_samples:
            return value


class InOrder:
    """The order of a dataset whose indices are positions."""

    def samples(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Returns the positions from `start` to `stop - 1`."""
        return np.arange(start, stop)


class EpochOrder:
    """`shuffled` over a whole range of positions, evaluated in blocks.

    A call costs about a third of a millisecond however few positions it is for, which is as much as a small micro-step:
    a block of positions costs little more and serves the windows that follow too.

    Args:
        num_samples, seed: as for `shuffled`.
        counts_on: add `epoch * num_samples` to the numbers of samples.
    """

    _BLOCK = 4096

    def __init__(self, num_samples: int, seed: int, *, counts_on: bool = False) -> None:
        self._num_samples = num_samples
        self._seed = seed
        self._counts_on = counts_on
        # What is being loaded ahead, what is in use, and neighbours.
        self._block = lru_cache(maxsize=4)(self._shuffled_block)

    def samples(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Returns the samples at the positions from `start` to `stop - 1` of an epoch."""
        before = epoch * self._num_samples if self._counts_on else 0
        if stop - start >= self._BLOCK:
            return shuffled(np.arange(start, stop), self._num_samples, self._seed, epoch) + before
        parts = [
            self._block(epoch, first)[max(start - first, 0) : stop - first]
            for first in range(start - start % self._BLOCK, stop, self._BLOCK)
        ]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts)) + before

    def _shuffled_block(self, epoch: int, first: int) -> NDArray[np.int64]:
        positions = np.arange(first, min(first + self._BLOCK, self._num_samples))
        return shuffled(positions, self._num_samples, self._seed, epoch)
