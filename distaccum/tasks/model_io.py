"""Takes micro-batches apart into what a model is called with and what its outputs are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distaccum.errors import UserError
from distaccum.runtime.nested import tensors_of

TARGETS = ("labels", "targets", "label", "target")
"""The names under which a micro-batch that is a mapping has its targets."""


def inputs_and_targets(batch: Any, task: str) -> tuple[Any, Tensor]:
    """Splits a micro-batch into the model's inputs and the targets.

    What holds no tensor, such as the names of files, goes to neither.

    Args:
        batch: a mapping with one of `TARGETS`, all else in it being inputs; or a tuple or list whose last field with a
            tensor is the targets.
        task: the task's name, for the message.

    Returns:
        The inputs, as `call_model` takes them, and the targets.

    Raises:
        UserError: the batch is neither.
    """
    if isinstance(batch, Mapping):
        name = next((name for name in TARGETS if isinstance(batch.get(name), Tensor)), None)
        inputs: Any = {str(key): value for key, value in batch.items() if key != name and tensors_of(value)}
        if name is not None and inputs:
            return inputs, batch[name]
    elif isinstance(batch, tuple | list):
        fields = [field for field in batch if tensors_of(field)]
        if len(fields) >= 2 and isinstance(fields[-1], Tensor):
            return fields[0] if len(fields) == 2 else tuple(fields[:-1]), fields[-1]
    got = f"a {type(batch).__name__}"
    if isinstance(batch, Mapping):
        got = f"a {type(batch).__name__} of {', '.join(map(str, batch)) or 'nothing'}"
    elif isinstance(batch, tuple | list):
        got = f"{len(batch)} fields ({', '.join(type(field).__name__ for field in batch)})"
    raise UserError(
        f"{task} needs micro-batches with inputs and targets: a tuple (inputs, targets), or a mapping with one of "
        f"{', '.join(TARGETS)} and the model's arguments by name; and got {got}. Change the samples of the dataset, "
        "set data.collate_fn, or write a task of your own (task=custom)."
    )


def as_classes(targets: Tensor, task: str) -> Tensor:
    """Returns targets that are classes as int64.

    Raises:
        UserError: they are no integers.
    """
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise UserError(f"{task} needs integers as targets, and got {targets.dtype}.")
    return targets.long()  # an unsigned format has no place for an ignore_index of -100


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Calls a model with a mapping's entries by name, with a tuple's fields in order, or with anything else alone.

    Raises:
        UserError: the model has no argument of an entry's name.
    """
    if isinstance(inputs, tuple):
        return model(*inputs)
    if not isinstance(inputs, Mapping):
        return model(inputs)
    try:
        return model(**inputs)
    except TypeError as error:
        unknown = next((name for name in inputs if f"unexpected keyword argument '{name}'" in str(error)), None)
        if unknown is None:
            raise
        raise UserError(
            f"the samples have {unknown}, and the model takes no such argument ({error}). Name fields of samples as "
            "the model's arguments, or leave them out; with data=tokens, data.form=targets is for model=gpt."
        ) from error
