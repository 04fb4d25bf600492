"""Building components that are named by `_target_`: a user's own model, dataset, task, optimizer or observer."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from distaccum.errors import UserError

TARGET = "_target_"


def locate(path: str, where: str) -> Callable[..., Any]:
    """The class or function at an import path such as `package.module.Class`.

    Args:
        path: the import path.
        where: the configuration key that named it, for the message.

    Raises:
        UserError: it cannot be imported, or is not callable.
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

    Args:
        section: a mapping or a dataclass with `_target_`. Values that hold a `_target_` themselves are built first.
        where: the section's configuration key, for messages.
        args: positional arguments that come before the keywords.
        defaults_from: an object whose attributes stand in for arguments of the same name that the section gives as
            null, or leaves out although they are required.

    Raises:
        UserError: there is no `_target_`, it does not import, or its arguments don't fit. What the component itself
            raises passes through.
    """
    arguments = _arguments(section, where)
    component = locate(arguments.pop(TARGET), where)
    arguments = {key: _build_nested(value, f"{where}.{key}") for key, value in arguments.items()}
    signature = _signature(component)
    if signature is not None:
        for name, parameter in signature.parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            is_required = parameter.default is parameter.empty
            wanted = arguments.get(name, parameter.default) is None or (name not in arguments and is_required)
            if wanted and hasattr(defaults_from, name):
                arguments[name] = getattr(defaults_from, name)
            elif wanted and is_required and name in arguments and defaults_from is not None:
                raise UserError(
                    f"{where}.{name} is null, and the data doesn't say it: {type(defaults_from).__name__} has no "
                    f"attribute {name}. Set {where}.{name}=…, or give the dataset that attribute."
                )
        _check_arguments(signature, component, where, args, arguments)
    return component(*args, **arguments)


def _arguments(section: Any, where: str) -> dict[str, Any]:
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


def _signature(component: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(component)
    except (ValueError, TypeError):  # some built-in callables have none
        return None


def _check_arguments(
    signature: inspect.Signature,
    component: Callable[..., Any],
    where: str,
    args: tuple[Any, ...],
    arguments: dict[str, Any],
) -> None:
    try:
        signature.bind(*args, **arguments)
    except TypeError as error:
        name = getattr(component, "__qualname__", repr(component))
        takes = ", ".join(list(signature.parameters)[len(args) :]) or "nothing"
        raise UserError(f"{where}: {name} cannot be called so: {error}. It takes: {takes}.") from None
