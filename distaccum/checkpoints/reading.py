"""Tensors of a checkpoint, read into tensors that are there."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load

from distaccum.checkpoints.folder import Checkpoint
from distaccum.checkpoints.state import check_same_model, persistent_buffers, set_extra_states
from distaccum.checkpoints.storage import ManifestReader
from distaccum.errors import UserError


def read_tensors(checkpoint: Checkpoint, targets: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Fills tensors with what a checkpoint has under their names; of sharded ones, this rank's part.

    Args:
        group: the ranks that read together. None: this process reads alone.

    Raises:
        UserError: it can't be read.
    """
    try:
        with torch.no_grad():
            without_process_warning()
            load(
                targets,
                storage_reader=ManifestReader(checkpoint),
                planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=group,
                no_dist=group is None,
            )
    except CheckpointException as error:  # a BaseException
        raise UserError(f"the checkpoint {checkpoint.path} can't be read: {reasons(error)}.") from error


def load_model(checkpoint: Checkpoint, module: nn.Module, average: str | None = None) -> None:
    """Puts a checkpoint's weights and buffers into a plain module, on its device and in its formats.

    Each process that calls it reads by itself.

    Args:
        average: `ema` or `swa`, to take those weights where there are any; frozen parameters have none.

    Raises:
        UserError: the checkpoint holds another model, or can't be read.
    """
    stored = checkpoint.manifest["tensors"]
    check_same_model(module, {name: entry["shape"] for name, entry in stored.items()})
    members = {name: parameter.detach() for name, parameter in module.named_parameters()}
    members |= dict(persistent_buffers(module))
    targets = {}
    for name, tensor in members.items():
        path = f"also/{average}/{name}"
        targets[path if average is not None and path in stored else f"model/{name}"] = tensor
    read_tensors(checkpoint, targets, None)
    with putting_back(checkpoint, "model"):
        set_extra_states(module, checkpoint.state["extra"])


def averaged_weights(checkpoint: Checkpoint, average: str) -> int | None:
    """How many updates' weights are in an average that a checkpoint keeps; None if it keeps none of that name."""
    path = f"also/{average}/n_averaged"
    if path not in checkpoint.manifest["tensors"]:
        return None
    count = torch.zeros((), dtype=torch.int64)
    read_tensors(checkpoint, {path: count}, None)
    return int(count)


@contextmanager
def putting_back(checkpoint: Checkpoint, name: str) -> Iterator[None]:
    """Has what doesn't take a saved state end with one message.

    Raises:
        UserError: in the place of what says that values are of another kind.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{checkpoint.path}: the state of {name} that is in it can't be put back ({_reason(error)}). Configure "
            "what it was saved of, or begin anew with resume=none and another run_dir."
        ) from error


def reasons(error: BaseException) -> str:
    """Why saving or reading failed, in one line: each reason once, with the first of its ranks if there are several."""
    if not isinstance(error, CheckpointException):
        return _reason(error)
    first_ranks: dict[str, int] = {}
    for rank, (failure, _) in sorted(error.failures.items()):
        first_ranks.setdefault(_reason(failure), rank)
    if len(first_ranks) == 1:
        return next(iter(first_ranks))
    return "; ".join(f"rank {rank}: {reason}" for reason, rank in first_ranks.items())


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    return f"{type(error).__name__}: {error}".splitlines()[0]


def without_process_warning() -> None:
    """One process is meant where `no_dist` is given; torch would warn that it takes us to mean that."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
