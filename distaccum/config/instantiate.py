"""Builds components that are named by `_target_`: a user's own model, dataset, task, optimizer or observer."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any

from distaccum.config.argument_types import require_types
from distaccum.errors import UserError

TARGET = "_target_"
_UNKNOWN = frozenset(("_recursive_", "_convert_"))


def locate(path: str, where: str) -> Callable[..., Any]:
    """Returns the class or function at an import path such as `package.module.Class`.

    Args:
        where: the configuration key that names it, for messages.

    Raises:
        UserError: it can't be imported, or is not callable.
    """
    try:
        found = _resolve(path)
    except (Exception, SystemExit) as error:  # an import runs arbitrary code, and whatever it raises is the reason
        raise UserError(
            f"{where}.{TARGET}={path} cannot be imported: {type(error).__name__}: {error}. "
            "Give the import path of a class or function that Python finds from here (PYTHONPATH helps)."
        ) from error
    if not callable(found):
        raise UserError(f"{where}.{TARGET}={path} is a {type(found).__name__}, not a class or function.")
    return found  # type: ignore[no-any-return]


def _resolve(path: str) -> Any:
    name, *names = path.split(".")
    found: Any = importlib.import_module(name)
    for attribute in names:
        name = f"{name}.{attribute}"
        # A module that is there but fails to import must say why: looking for it comes before importing it.
        is_package = isinstance(found, ModuleType) and hasattr(found, "__path__")
        if is_package and not hasattr(found, attribute) and importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
        found = getattr(found, attribute)
    return found


def build(section: Any, where: str, *args: Any, defaults_from: object = None) -> Any:
    """Calls what a section names by `_target_` with the section's other keys as keyword arguments.

    As with `hydra.utils.instantiate`, `_args_` lists positional arguments, and `_partial_: true` asks for a
    `functools.partial` instead of a call.

    Args:
        section: a mapping or a dataclass with `_target_`. Values that hold a `_target_` themselves are built first.
        where: the section's configuration key, for messages.
        args: positional arguments that come before those of `_args_`.
        defaults_from: an object whose attributes stand in for arguments of the same name that the section gives as
            null (those of a `**kwargs` too, which must then be there), or leaves out although they are required.

    Raises:
        UserError: there is no `_target_`, it can't be imported, or its arguments don't fit. A component's own
            `UserError` gets the section's key; its other errors are not caught.
    """
    arguments = arguments_of(section, where)
    component = locate(arguments.pop(TARGET), where)
    is_partial, listed = arguments.pop("_partial_", False), arguments.pop("_args_", [])
    if not isinstance(is_partial, bool) or not isinstance(listed, list) or not _UNKNOWN.isdisjoint(arguments):
        raise UserError(
            f"{where}: of Hydra's own keys there are _args_, a list, and _partial_, true or false. Whatever has a "
            f"{TARGET} is built, and components get plain dictionaries and lists (as with _convert_=all)."
        )
    positional = [*args, *_build_nested(listed, f"{where}._args_")]
    arguments = {key: _build_nested(value, f"{where}.{key}") for key, value in arguments.items()}
    signature = signature_of(component)
    to_be_filled = {key for key, value in arguments.items() if value is None and defaults_from is not None}
    require_types(component, {key: arguments[key] for key in arguments.keys() - to_be_filled}, where)
    if defaults_from is not None:
        _fill(arguments, signature, len(positional), where, defaults_from)
    if signature is not None:
        try:
            (signature.bind_partial if is_partial else signature.bind)(*positional, **arguments)
        except TypeError as error:
            name = getattr(component, "__qualname__", repr(component))
            takes = ", ".join(list(signature.parameters)[len(positional) :]) or "nothing"
            raise UserError(f"{where}: {name} cannot be called so: {error}. It takes: {takes}.") from None
    if is_partial:
        return partial(component, *positional, **arguments)
    try:
        return component(*positional, **arguments)
    except TypeError as error:
        if signature is not None:
            raise
        raise UserError(f"{where}: {component!r} cannot be called so: {error}.") from error
    except UserError as error:
        group = re.escape(where.partition(".")[0])
        if type(error) is not UserError or re.search(rf"\b{group}[.=:]", str(error)):
            raise
        raise UserError(f"{where}: {error}") from error


def _fill(
    arguments: dict[str, Any], signature: inspect.Signature | None, num_positional: int, where: str, source: object
) -> None:
    """Takes arguments from `source` that are null, or that are required and left out."""
    parameters = [] if signature is None else list(signature.parameters.values())[num_positional:]
    defaults = {p.name: p.default for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    for name in [*defaults, *(arguments.keys() - defaults.keys())]:
        is_required = defaults.get(name) is inspect.Parameter.empty
        wanted = arguments.get(name, defaults.get(name)) is None or (name not in arguments and is_required)
        if wanted and hasattr(source, name):
            arguments[name] = getattr(source, name)
        elif wanted and name in arguments and (is_required or name not in defaults):
            # A null that goes into **kwargs might be as good as left out, and what stands in for it not be meant.
            or_not = "" if is_required else f", leave {where}.{name} out"
            raise UserError(
                f"{where}.{name} is null, and the data doesn't say it: {type(source).__name__} has no "
                f"attribute {name}. Set {where}.{name}=…{or_not}, or give the dataset that attribute."
            )


def arguments_of(section: Any, where: str) -> dict[str, Any]:
    """Returns a section's keys and values, `_target_` among them.

    Raises:
        UserError: it has no `_target_`.
    """
    if dataclasses.is_dataclass(section) and not isinstance(section, type):
        section = {entry.name: getattr(section, entry.name) for entry in dataclasses.fields(section)}
    if not isinstance(section, Mapping) or not isinstance(section.get(TARGET), str):
        raise UserError(
            f"{where} must name a class or function by {TARGET}; got {section!r}. "
            f"For example {where}.{TARGET}=my_package.MyClass"
        )
    return {str(key): value for key, value in section.items()}


def _build_nested(value: Any, where: str) -> Any:
    if isinstance(value, Mapping) and TARGET in value:
        return build(value, where)
    if isinstance(value, Mapping):
        return {key: _build_nested(entry, f"{where}.{key}") for key, entry in value.items()}
    if isinstance(value, list):
        return [_build_nested(entry, f"{where}[{index}]") for index, entry in enumerate(value)]
    return value


def signature_of(component: Callable[..., Any]) -> inspect.Signature | None:
    """Returns the signature of a component; None for the built-in callables that have none."""
    try:
        return inspect.signature(component)
    except (ValueError, TypeError):  # some built-in callables have none
        return None
