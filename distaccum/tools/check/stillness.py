"""Modes that take out randomness, by replacing every draw by its mean, and casts to lower formats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_WIDE = {
    **dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64),
    torch.complex64: torch.complex128,
}
_PROBABILITIES = ("dropout_p", "dropout")
"""Names of the arguments of fused kernels (attention, recurrent layers) that are probabilities of dropout."""


class StillDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Replaces all random draws of torch by their means, which makes dropout the identity.

    Unlike `module.eval()` it leaves everything else in training mode, and it reaches functional dropout, dropout inside
    attention kernels and noise that a model adds by hand. Permutations and multinomial draws have no mean and stay.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._overloadpacket._qualified_op_name
        if name == "aten::native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if name == "aten::native_dropout_backward":
            return args[0].clone()
        if name in _MEANS:
            mean = _MEANS[name](_arguments(func, args, kwargs))
            # An operator that makes a tensor draws it, for its shape and format, and is then overwritten.
            tensor = args[0] if name.endswith("_") else func(*args, **kwargs)
            return tensor.copy_(mean) if isinstance(mean, Tensor) else tensor.fill_(mean)
        if name.startswith("aten::"):
            named = zip((argument.name for argument in func._schema.arguments), args, strict=False)
            args = [0.0 if key in _PROBABILITIES else value for key, value in named]
            kwargs = {key: 0.0 if key in _PROBABILITIES else value for key, value in kwargs.items()}
        return func(*args, **kwargs)


class WideCasts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Replaces a model's or a loss's casts to lower formats, as in norms computed in float32, by casts to float64.

    After rounding to float32, differences between samples look like rounding, and slopes can't be measured.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.has_widened = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(torch.dtype, self._widened, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _widened(self, dtype: torch.dtype) -> torch.dtype:
        self.has_widened |= dtype in _WIDE
        return _WIDE.get(dtype, dtype)


class DrawWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which modules draw random numbers.

    Args:
        where: returns the name of the module that is being computed.
    """

    def __init__(self, where: Callable[[], str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.modules: list[str] = []
        self._where = where

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            arguments = _arguments(func, args, kwargs or {})
            name = self._where()
            # Attention without dropout has the tag too, and draws nothing.
            if all(arguments.get(key, True) for key in _PROBABILITIES) and name not in self.modules:
                self.modules.append(name)
        return func(*args, **(kwargs or {}))


def _arguments(func: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of an operator's call by name, with the defaults of those that are left out."""
    declared = func._schema.arguments
    defaults = {argument.name: argument.default_value for argument in declared if argument.has_default_value()}
    return {**defaults, **dict(zip((argument.name for argument in declared), args, strict=False)), **kwargs}


_MEANS: dict[str, Callable[[dict[str, Any]], Any]] = {
    # Dropout on a CPU draws bernoulli_(1 - p) and divides by 1 - p, so the mean makes it exactly 1.
    "aten::bernoulli_": lambda given: given["p"],
    "aten::bernoulli": lambda given: given.get("p", given["self"]),
    "aten::rand": lambda given: 0.5,
    "aten::rand_like": lambda given: 0.5,
    "aten::randn": lambda given: 0.0,
    "aten::randn_like": lambda given: 0.0,
    "aten::randint": lambda given: (given.get("low", 0) + given["high"] - 1) // 2,
    "aten::randint_like": lambda given: (given.get("low", 0) + given["high"] - 1) // 2,
    "aten::uniform_": lambda given: (given["from"] + given["to"]) / 2,
    "aten::normal_": lambda given: given["mean"],
    "aten::exponential_": lambda given: 1 / given["lambd"],
}
"""The mean of what an operator draws, from its arguments. Operators whose names end with _ fill their first one."""
