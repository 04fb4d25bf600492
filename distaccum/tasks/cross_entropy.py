"""What the two cross-entropy tasks have in common."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distaccum.errors import UserError


def inputs_and_targets(batch: Any, task: str) -> tuple[Tensor, Tensor]:
    """The two tensors of a micro-batch, the targets as int64.

    Raises:
        UserError: the micro-batch is anything else, or the targets are no integers.
    """
    if not (isinstance(batch, tuple | list) and [isinstance(field, Tensor) for field in batch] == [True, True]):
        raise UserError(
            f"{task} needs micro-batches of two tensors, (inputs, targets), and got {_described(batch)}. Change the "
            "samples of the dataset, set data.collate_fn, or write a task of your own (task=custom)."
        )
    inputs, targets = batch
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise UserError(f"{task} needs integers as targets, and got {targets.dtype}.")
    return inputs, targets.long()  # an unsigned format has no place for an ignore_index of -100


def summed_cross_entropy(
    logits: Tensor, targets: Tensor, task: str, *, ignore_index: int, label_smoothing: float = 0.0
) -> Tensor:
    """Sum of the cross-entropies, a scalar, in float32 at least.

    Args:
        logits: `[N, C]`.
        targets: integers `[N]` in `range(C)`, or `ignore_index`.
        task: name of the task, for messages.
        ignore_index: the target that adds nothing.
        label_smoothing: probability mass spread over all classes.

    Raises:
        UserError: a target outside the classes. On CUDA it is the device that stops: looking at the targets would make
            the host wait for them.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()  # a sum over many elements overflows float16 and loses digits in bfloat16
    try:
        return F.cross_entropy(
            logits, targets, reduction="sum", ignore_index=ignore_index, label_smoothing=label_smoothing
        )
    except IndexError as error:
        raise UserError(
            f"{task}: the model has {logits.shape[-1]} outputs, which does not cover all targets ({error}) "
            "They must be integers from 0 to one below the number of outputs."
        ) from error


def _described(batch: Any) -> str:
    if isinstance(batch, tuple | list):
        return f"{len(batch)} fields ({', '.join(type(field).__name__ for field in batch)})"
    return f"a {type(batch).__name__}"
