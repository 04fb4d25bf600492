"""Reads what models return: a tensor, or logits among other things."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distaccum.errors import UserError
from distaccum.runtime.nested import tensors_of


def logits_of(output: Any) -> Tensor:
    """Returns a model's one output, or the logits among several.

    Args:
        output: a tensor; an object or mapping with `logits`, as transformers' models return; a tuple, list or mapping
            with one tensor in it; or a tuple or list that begins with the logits.

    Raises:
        UserError: it is none of these.
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(found, Tensor) and isinstance(output, tuple | list) and output:
        found = output[0]
    if not isinstance(found, Tensor) and isinstance(output, tuple | list | Mapping):
        tensors = tensors_of(output)
        found = tensors[0] if len(tensors) == 1 else None
    if not isinstance(found, Tensor):
        names = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) and output else ""
        raise UserError(
            f"the model returned a {type(output).__name__}{names}, in which the logits can't be found. It must return "
            "a tensor, an object or mapping with `logits`, or a tuple that begins with them; or write a task of your "
            "own (task=custom)."
        )
    return found
