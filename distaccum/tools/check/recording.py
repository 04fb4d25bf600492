"""Recordings of the inputs and outputs of every module in a forward, and the first module where two of them differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distaccum.runtime.nested import tensors_of
from distaccum.tools.check.stillness import DrawWatch

Select = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor] | None]
"""Returns the parts to compare of two recordings' tensors, from the number of the call; None if there are none."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of one module."""

    name: str
    inputs: list[Tensor]
    outputs: list[Tensor]


@dataclass(slots=True)
class Recording:
    """A forward.

    Attributes:
        calls: those of the model's modules, in the order in which they ended: submodules come before their module.
        drawing_modules: names of the modules that drew random numbers.
        loss, dtype, weight: sum of the losses, its format, and its weight, if a task was computed.
        terms: names of the further losses.
    """

    calls: list[Call] = field(default_factory=list)
    drawing_modules: list[str] = field(default_factory=list)
    loss: float = math.nan
    dtype: torch.dtype = torch.float64
    weight: float = math.nan
    terms: frozenset[str] = frozenset()


@contextmanager
def recording(model: nn.Module) -> Iterator[Recording]:
    """Records all calls of the model's modules while the context is open."""
    found = Recording()
    running: list[tuple[str, list[Tensor]]] = []

    def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        started, inputs = running.pop()
        found.calls.append(Call(started, inputs, _copies(output)))

    with ExitStack() as stack:
        for name, module in model.named_modules():
            # Inputs are copied on the way in, because a module may work in place.
            def before(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                running.append((name, _copies((args, kwargs))))

            stack.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
            stack.enter_context(module.register_forward_hook(after, with_kwargs=True))
        watch = stack.enter_context(DrawWatch(lambda: running[-1][0] if running else "the task"))
        found.drawing_modules = watch.modules
        yield found


def first_parting(
    one: Sequence[Call],
    other: Sequence[Call],
    *,
    tolerance: float = 0.0,
    select: Select = lambda number, left, right: (left, right),
) -> str | None:
    """Returns the first module whose inputs agree in two recordings and whose outputs do not.

    Args:
        tolerance: relative difference that still counts as agreement.
        select: selects the parts to compare. Where it finds none, inputs are compared as they are, and outputs are not.
    """
    for number, (mine, yours) in enumerate(zip(one, other, strict=False)):
        if mine.name != yours.name:
            return None  # other modules were called: what comes after can't be compared
        inputs = (select(number, *pair) or pair for pair in zip(mine.inputs, yours.inputs, strict=False))
        if all(agree(*pair, tolerance) for pair in inputs) and differ(number, mine, yours, tolerance, select):
            return mine.name
    return None


def differ(number: int, one: Call, other: Call, tolerance: float, select: Select) -> bool:
    """Returns whether the outputs of two calls of a module differ in the parts that are selected."""
    outputs = (select(number, *pair) for pair in zip(one.outputs, other.outputs, strict=False))
    return any(pair is not None and not agree(*pair, tolerance) for pair in outputs)


def agree(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Returns whether ‖difference‖ ≤ tolerance · ‖value‖. Tensors of different shape never agree."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if torch.equal(one, other):
        return True
    if not (one.is_floating_point() or one.is_complex()):
        return False
    equal = (one == other) | (one.isnan() & other.isnan())  # infinities of masks are equal, and have no difference
    difference = torch.where(equal, 0.0, one.double() - other.double())
    size = torch.where(one.isfinite(), one.double(), 0.0)
    return bool(difference.norm() <= tolerance * size.norm())


def all_agree(one: Any, other: Any) -> bool:
    """Returns whether the tensors of two nests are the same."""
    return all(agree(a, b, 0.0) for a, b in zip(all_tensors(one), all_tensors(other), strict=False))


def described(model: nn.Module, name: str) -> str:
    """Returns a module's name and class: `layers.3 (BatchNorm1d)`."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return name
    return f"{name} ({type(module).__name__})" if name else f"the model itself ({type(module).__name__})"


def _copies(values: Any) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in all_tensors(values)]


def all_tensors(value: Any) -> list[Tensor]:
    """Returns the tensors of a nested value, and those of an object with attributes, as other libraries' models
    return."""
    if isinstance(value, tuple | list):
        return [tensor for entry in value for tensor in all_tensors(entry)]
    found = tensors_of(value)
    if not found and hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
        found = tensors_of(vars(value))
    return found
