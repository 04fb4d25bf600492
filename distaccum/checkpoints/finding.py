"""Finding the checkpoint to go on from, together with the other ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from distaccum.checkpoints.folder import (
    MANIFEST,
    Checkpoint,
    DamagedCheckpointError,
    checkpoints_in,
    read_checkpoint,
    verify_files,
)
from distaccum.checkpoints.form import SAFETENSORS_NAMES

logger = logging.getLogger(__name__)


def newest_whole(folder: Path, *, rank: int, gather: Callable[[Any], list[Any]]) -> Checkpoint | None:
    """The newest checkpoint in a folder whose files are all as they were written; ranks check a part of them each.

    Args:
        gather: gives every rank's value on every rank.
    """
    for path in gather(checkpoints_in(folder) if rank == 0 else None)[0]:
        checkpoint, problems = checked(path, rank=rank, gather=gather)
        if checkpoint is not None:
            return checkpoint
        if rank == 0:
            logger.warning("the checkpoint %s is damaged and passed over: %s", path, problems)
    return None


def checked(path: Path, *, rank: int, gather: Callable[[Any], list[Any]]) -> tuple[Checkpoint | None, str]:
    """The checkpoint in a folder, or None and what is wrong with it; the same on all ranks."""
    checkpoint, problem = None, None
    try:
        checkpoint = read_checkpoint(path)
    except DamagedCheckpointError as error:
        problem = str(error)
    ranks = len(gather(None))
    if checkpoint is not None:
        try:
            verify_files(checkpoint, checkpoint.files[rank::ranks])
            _check_content(checkpoint, checkpoint.files[rank::ranks])
        except DamagedCheckpointError as error:
            problem = str(error)
    problems = [entry for entry in gather(problem) if entry is not None]
    return (None, "; ".join(dict.fromkeys(problems))) if problems else (checkpoint, "")


def _check_content(checkpoint: Checkpoint, names: list[str]) -> None:
    """Refuses files that don't hold what the manifest says."""
    wanted: dict[str, list[tuple[str, tuple[list[int], str]]]] = {name: [] for name in names}
    for tensor in checkpoint.manifest["tensors"].values():
        for chunk in tensor["chunks"]:
            if chunk["file"] in wanted:
                wanted[chunk["file"]].append((chunk["key"], (chunk["shape"], SAFETENSORS_NAMES[tensor["dtype"]])))
    for name, pieces in wanted.items():
        try:
            with safe_open(checkpoint.path / name, framework="np") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                found = {key: (entry.get_shape(), entry.get_dtype()) for key, entry in slices.items()}
        except SafetensorError as error:
            raise DamagedCheckpointError(f"{name} is no safetensors file ({error})") from error
        if any(found.get(key) != piece for key, piece in pieces):
            raise DamagedCheckpointError(f"{name} doesn't hold the tensors that {MANIFEST} names")
