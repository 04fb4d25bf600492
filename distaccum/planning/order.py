"""Orders an epoch's samples by a permutation that can be evaluated at any position."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

_FEISTEL_ROUNDS = 8
_FEW = 16
"""Positions for which it is faster to do without numpy."""
_TABLED_BITS = 14
"""Of half a position, at most: a table of a round has 2^14 entries then, and the eight of an epoch a MiB."""
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
    permuted = _permutation(half_bits, keys)
    values = permuted(np.asarray(positions, dtype=np.int64))
    outside = np.flatnonzero(values >= num_samples)
    while outside.size:
        values[outside] = permuted(values[outside])
        outside = outside[values[outside] >= num_samples]
    return values


def _permutation(half_bits: int, keys: NDArray[np.uint64]) -> Callable[[NDArray[np.int64]], NDArray[np.int64]]:
    """Returns the Feistel network. What a round makes of half a position is looked up where tables for it are small."""
    if half_bits <= _TABLED_BITS:
        rounds = [partial(np.take, table, mode="clip") for table in _tables(half_bits, keys.tobytes())]
    else:
        rounds = [partial(_round, key=key, half_bits=half_bits) for key in keys]

    def permuted(values: NDArray[np.int64]) -> NDArray[np.int64]:
        left, right = values >> half_bits, values & ((1 << half_bits) - 1)
        for of_half in rounds:
            left ^= of_half(right)
            left, right = right, left
        return (left << half_bits) | right

    return permuted


@lru_cache(maxsize=2)
def _tables(half_bits: int, keys: bytes) -> list[NDArray[np.int64]]:
    halves = np.arange(1 << half_bits)
    return [_round(halves, key, half_bits) for key in np.frombuffer(keys, np.uint64)]


def _round(halves: NDArray[np.int64], key: np.uint64, half_bits: int) -> NDArray[np.int64]:
    mixed = halves.astype(np.uint64)
    mixed += key
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    mixed >>= np.uint64(64 - half_bits)  # the top bits are the best mixed ones
    return mixed.view(np.int64)


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
        self._block = lru_cache(maxsize=4)(self._kept_block)

    def samples(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Returns the samples at the positions from `start` to `stop - 1` of an epoch."""
        if stop - start >= self._BLOCK:
            return self._evaluated(epoch, start, stop)
        within = start % self._BLOCK
        if (stop - start) + within <= self._BLOCK:
            return self._block(epoch, start - within)[within : within + stop - start]
        parts = [
            self._block(epoch, first)[max(start - first, 0) : stop - first]
            for first in range(start - within, stop, self._BLOCK)
        ]
        return np.concatenate(parts)

    def _kept_block(self, epoch: int, first: int) -> NDArray[np.int64]:
        return self._evaluated(epoch, first, min(first + self._BLOCK, self._num_samples))

    def _evaluated(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        found = shuffled(np.arange(start, stop), self._num_samples, self._seed, epoch)
        return found + epoch * self._num_samples if self._counts_on else found
