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
        kwargs = dict(kwargs or {})
        name = func._overloadpacket._qualified_op_name
        still = _STILL.get(name)
        if still is not None:
            return still(func, args, kwargs)
        if name.startswith("aten::"):
            args = _without_dropout(func, args, kwargs)
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
        if torch.Tag.nondeterministic_seeded in func.tags and _does_draw(func, args, kwargs or {}):
            name = self._where()
            if name not in self.modules:
                self.modules.append(name)
        return func(*args, **(kwargs or {}))


def _argument(func: Any, args: Any, kwargs: dict[str, Any], name: str, default: Any = None) -> Any:
    for index, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            if index < len(args):
                return args[index]
            return kwargs.get(name, argument.default_value if argument.has_default_value() else default)
    return default


def _does_draw(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Returns whether an operator that may draw does so with these arguments (attention without dropout doesn't)."""
    names = {argument.name for argument in func._schema.arguments}
    for name in _PROBABILITIES:
        if name in names:
            return bool(_argument(func, args, kwargs, name))
    return True


def _without_dropout(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    for index, argument in enumerate(func._schema.arguments):
        if argument.name in _PROBABILITIES:
            if index < len(args):
                args = (*args[:index], 0.0, *args[index + 1 :])
            elif argument.name in kwargs:
                kwargs[argument.name] = 0.0
    return args


def _filled(mean: Callable[[Any, Any, dict[str, Any]], Any]) -> Callable[..., Any]:
    """Replaces an operator that fills an existing tensor."""

    def still(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        value = mean(func, args, kwargs)
        return args[0].copy_(value) if isinstance(value, Tensor) else args[0].fill_(value)

    return still


def _made(value: float) -> Callable[..., Any]:
    """Replaces an operator that makes a tensor, which is drawn for its shape and dtype, and overwritten."""
    return lambda func, args, kwargs: func(*args, **kwargs).fill_(value)


def _randint(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    low, high = _argument(func, args, kwargs, "low", 0), _argument(func, args, kwargs, "high")
    return func(*args, **kwargs).fill_((low + high - 1) // 2)


def _bernoulli(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    probability = _argument(func, args, kwargs, "p")
    return args[0].clone() if probability is None else torch.full_like(args[0], probability)


def _native_dropout(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)


_STILL: dict[str, Callable[..., Any]] = {
    # Dropout on a CPU draws bernoulli_(1 - p) and divides by 1 - p, so the mean makes it exactly 1.
    "aten::bernoulli_": _filled(lambda func, args, kwargs: _argument(func, args, kwargs, "p", 0.5)),
    "aten::bernoulli": _bernoulli,
    "aten::native_dropout": _native_dropout,
    "aten::native_dropout_backward": lambda func, args, kwargs: args[0].clone(),
    "aten::rand": _made(0.5),
    "aten::rand_like": _made(0.5),
    "aten::randn": _made(0.0),
    "aten::randn_like": _made(0.0),
    "aten::randint": _randint,
    "aten::randint_like": _randint,
    "aten::uniform_": _filled(
        lambda func, args, kwargs: (
            (_argument(func, args, kwargs, "from", 0.0) + _argument(func, args, kwargs, "to", 1.0)) / 2
        )
    ),
    "aten::normal_": _filled(lambda func, args, kwargs: _argument(func, args, kwargs, "mean", 0.0)),
    "aten::exponential_": _filled(lambda func, args, kwargs: 1 / _argument(func, args, kwargs, "lambd", 1.0)),
}
