"""Refuses arguments of the package's own components that are not of the types that these declare.

The schema checks the keys of a section; what a section passes on to a component, as `data.train.num_samples`, has no
schema. Components of others may take what they like.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from distaccum.errors import UserError

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}


def require_types(component: Callable[..., Any], arguments: Mapping[str, Any], where: str) -> None:
    """Checks values of a configuration against the annotations of what they are for.

    Args:
        where: the key of the section, for messages.

    Raises:
        UserError: a value is of another type.
    """
    if not str(getattr(component, "__module__", "")).startswith("distaccum."):
        return
    try:
        hints = get_type_hints(component.__init__ if isinstance(component, type) else component)  # type: ignore[misc]
    except NameError:  # a type that is imported for the type checker alone
        return
    for name, value in arguments.items():
        if name in hints and not _fits(value, hints[name]):
            shown = "null" if value is None else repr(value)
            raise UserError(f"{where}.{name}={shown} is impossible: it takes {_described(hints[name])}.")


def _fits(value: Any, hint: Any) -> bool:
    """Returns whether a value is of a type; True for types that a configuration can't write down."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in inner)
    if origin is Literal:
        return value in inner
    if origin in (list, Sequence, tuple) and inner:
        parts = inner[:1] if origin is not tuple or inner[-1] is Ellipsis else ()
        return isinstance(value, list | tuple) and all(_fits(entry, part) for entry in value for part in parts)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    if hint in _NAMES:
        return isinstance(value, hint)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return isinstance(value, hint | str)
    return True


def _described(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_described(part) for part in inner)
    if origin is Literal:
        return " or ".join(map(str, inner))
    if origin in (list, Sequence, tuple) and inner:
        return f"a list, each entry {_described(inner[0])}"
    if origin in (dict, Mapping):
        return "a mapping"
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))
