"""Splits the arguments of a call among replicas, and puts their outputs together. For `strategy=dp`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from distaccum.errors import UserError
from distaccum.runtime.nested import like, mapped, tensors_of

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a module: `(args, kwargs)`."""


def batch_size(call: Call) -> int:
    """Size of the first dimension of all tensors of a call, nested ones too; 0 if it has none but scalars.

    Raises:
        UserError: tensors of unequal sizes.
    """
    batched = [tensor for tensor in tensors_of(call) if tensor.dim() > 0]
    sizes = {len(tensor) for tensor in batched}
    if len(sizes) > 1:
        raise UserError(
            "strategy=dp scatters all tensors that the model is called with along their first dimension, but they are "
            f"of unequal size there: {', '.join(str(list(tensor.shape)) for tensor in batched)}. Make what is not one "
            "entry per sample a buffer of the model, or repeat it for each sample."
        )
    return sizes.pop() if sizes else 0


def scatter(call: Call, replicas: int) -> list[Call]:
    """Splits a call along the first dimension of its tensors.

    Args:
        call: tensors may be nested in tuples, lists and mappings; scalar tensors and everything else go to each part.
        replicas: number of parts at most; there are as many as `torch.chunk` makes, and never an empty one.

    Raises:
        UserError: tensors with unequal batch sizes.
    """
    size = batch_size(call)
    if size <= 1:
        return [call]
    step = -(-size // replicas)
    return [_part(call, start, min(start + step, size)) for start in range(0, size, step)]


def _part(call: Call, start: int, stop: int) -> Any:
    return mapped(call, lambda leaf: leaf[start:stop] if isinstance(leaf, Tensor) and leaf.dim() > 0 else leaf)


def gather(
    outputs: Sequence[Any],
    sizes: Sequence[int],
    device: torch.device | None = None,
    where: str = "the model's output",
) -> Any:
    """Puts outputs of replicas together along the first dimension of their tensors.

    Args:
        outputs: one per replica: a tensor, or tuples, lists and mappings of them. Numbers, strings and None stay as
            they are if they are the same in all.
        sizes: samples that each replica had.
        device: where the result is to be; None for where the outputs are.
        where: what the outputs are, for messages.

    Raises:
        UserError: a tensor without entries for each sample, shapes that don't fit together, or something else that
            can't be put together.
    """
    first = outputs[0]
    if len(outputs) == 1:
        return first
    if any(type(output) is not type(first) for output in outputs):
        names = ", ".join(type(output).__name__ for output in outputs)
        raise UserError(f"{where} is not of the same type in all replicas: {names}.")
    if isinstance(first, Tensor):
        _check_tensors(outputs, sizes, where)
        return torch.cat([output if device is None else output.to(device) for output in outputs])
    if isinstance(first, Mapping):
        if any(output.keys() != first.keys() for output in outputs):
            keys = "; ".join(str(list(output)) for output in outputs)
            raise UserError(f"{where} has not the same keys in all replicas: {keys}.")
        return like(
            first, [gather([output[key] for output in outputs], sizes, device, f"{where}[{key!r}]") for key in first]
        )
    if isinstance(first, tuple | list):
        if any(len(output) != len(first) for output in outputs):
            lengths = ", ".join(str(len(output)) for output in outputs)
            raise UserError(f"{where} has not the same number of entries in all replicas: {lengths}.")
        entries = enumerate(zip(*outputs, strict=True))
        return like(first, [gather(entry, sizes, device, f"{where}[{number}]") for number, entry in entries])
    if isinstance(first, NoneType | bool | int | float | complex | str) and all(output == first for output in outputs):
        return first
    raise UserError(
        f"{where} can't be put together from those of {len(outputs)} replicas: {', '.join(map(repr, outputs))}. Under "
        "strategy=dp the model must return tensors with entries for each sample, or tuples, lists and dictionaries of "
        "them."
    )


def _check_tensors(outputs: Sequence[Tensor], sizes: Sequence[int], where: str) -> None:
    shapes = ", ".join(str(list(output.shape)) for output in outputs)
    if any(output.dim() == 0 for output in outputs):
        raise UserError(
            f"{where} is a scalar in each of {len(outputs)} replicas, and strategy=dp can't put them "
            "together: a mean of their means is wrong when they have unequal numbers of samples. Return one entry per "
            "sample and take the loss in the task, or set strategy=single or strategy=ddp."
        )
    if len({output.shape[1:] for output in outputs}) > 1:
        raise UserError(
            f"{where} has shapes that don't fit together: {shapes}. Under strategy=dp only the first dimension may "
            "depend on a replica's samples."
        )
    # Such as a loss of shape [1], or states of shape [layers, samples, width].
    if any(len(output) * sizes[0] != len(outputs[0]) * size for output, size in zip(outputs, sizes, strict=True)) or (
        len(outputs[0]) % sizes[0]
    ):
        raise UserError(
            f"{where} has shapes {shapes} in replicas that had {', '.join(map(str, sizes))} samples. Under strategy=dp "
            "the first dimension must be that of the samples: as many entries as samples, or the same multiple."
        )
