"""Encodes Python values as JSON without loss, where JSON alone has one kind of list and of key."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_DICTS: dict[str, type] = {"dict": dict, "Counter": Counter, "OrderedDict": OrderedDict}
_MOST_NUMBERS = 4096


def encoded(value: Any, kept: list[Tensor] | None = None) -> Any:
    """Returns JSON for a value of None, bools, numbers, texts, and lists, tuples, dictionaries and tensors of them.

    Args:
        kept: a list to append tensors to; the JSON has their positions in it. Default: small tensors are written out.

    Raises:
        TypeError: it is, or holds, something else; the message names it.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if type(value) is list:
        return [encoded(entry, kept) for entry in value]
    if type(value) is tuple:
        return {"__tuple__": [encoded(entry, kept) for entry in value]}
    if type(value) is dict and all(type(key) is str and not key.startswith("__") for key in value):
        return {key: encoded(entry, kept) for key, entry in value.items()}
    if type(value) in _DICTS.values():
        return {f"__{type(value).__name__}__": [[encoded(k), encoded(entry, kept)] for k, entry in value.items()]}
    if type(value) in (Tensor, nn.Parameter) and kept is not None:
        order = sorted(range(value.ndim), key=value.stride, reverse=True)
        kept.append(value.detach())
        return {"__kept__": [len(kept) - 1, order, value.device.type == "cpu"]}
    if type(value) in (Tensor, nn.Parameter) and value.numel() <= _MOST_NUMBERS and not value.is_complex():
        dtype = str(value.dtype).removeprefix("torch.")
        return {"__tensor__": [dtype, list(value.shape), value.detach().flatten().tolist()]}
    raise TypeError(f"a {type(value).__name__}" + (f" of {value.numel()} numbers" if isinstance(value, Tensor) else ""))


def decoded(value: Any, kept: Sequence[Tensor] = (), device: torch.device | None = None) -> Any:
    """Returns the value that `encoded` was given.

    Args:
        kept: the list that `encoded` has filled.
        device: where to put those that were not on the CPU. Their memory gets the order of dimensions that it had.
    """
    if isinstance(value, list):
        return [decoded(entry, kept, device) for entry in value]
    if not isinstance(value, dict):
        return value
    found: tuple[str, Any] = next(iter(value.items()), ("", None))
    kind, content = found
    match kind.removeprefix("__").removesuffix("__") if kind.startswith("__") else None:
        case "tuple":
            return tuple(decoded(entry, kept, device) for entry in content)
        case "tensor":
            dtype, shape, numbers = content
            return torch.tensor(numbers, dtype=getattr(torch, dtype)).reshape(shape)
        case "kept":
            number, order, on_cpu = content
            back = sorted(range(len(order)), key=order.__getitem__)
            return kept[number].permute(order).contiguous().permute(back).to(None if on_cpu else device)
        case name if name in _DICTS:
            pairs = {decoded(key): decoded(entry, kept, device) for key, entry in content}
            return _DICTS[name](pairs)
    return {key: decoded(entry, kept, device) for key, entry in value.items()}
