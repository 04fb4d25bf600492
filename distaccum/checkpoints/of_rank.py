"""Tensors of a checkpoint that are one rank's alone, besides those that every checkpoint has."""

from __future__ import annotations

import torch
from torch import Tensor

from distaccum.checkpoints.folder import Checkpoint
from distaccum.checkpoints.state import read_tensors
from distaccum.checkpoints.storage import ManifestReader


def read_own(checkpoint: Checkpoint, rank: int, kind: str) -> dict[str, Tensor]:
    """Reads the tensors `kind/…` of `Checkpointer.own` of a rank, on the CPU, by what follows; no rank waits.

    Raises:
        UserError: they can't be read.
    """
    prefix = f"rank/{rank}/{kind}/"
    found = {name: entry for name, entry in ManifestReader(checkpoint).formats().items() if name.startswith(prefix)}
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in found.items()}
    if tensors:
        read_tensors(checkpoint, tensors, None)
    return {name.removeprefix(prefix): value for name, value in tensors.items()}
