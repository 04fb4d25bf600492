"""Random states, each a function of the run's seed and of what it is for."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def derived_seed(seed: int, *purpose: str | int) -> int:
    """A seed of 63 bits for one purpose, unrelated to the seeds of other purposes."""
    digest = hashlib.blake2b("/".join(map(str, (seed, *purpose))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
