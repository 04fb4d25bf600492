"""Turns a typed configuration into JSON and back, so that other processes get exactly what was checked here."""

from __future__ import annotations

import dataclasses
import importlib
from enum import Enum
from typing import Any

_DATACLASS = "(dataclass)"
_ENUM = "(enum)"


def to_portable(value: Any) -> Any:
    """Returns what `json.dumps` takes, with the names of dataclasses and enums beside their values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        entries = {entry.name: to_portable(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
        return {_DATACLASS: _name_of(type(value)), **entries}
    if isinstance(value, Enum):
        return {_ENUM: _name_of(type(value)), "name": value.name}
    if isinstance(value, dict):
        return {str(key): to_portable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_portable(entry) for entry in value]
    return value


def from_portable(value: Any) -> Any:
    """Returns the configuration that `to_portable` was given, checked again."""
    if isinstance(value, list):
        return [from_portable(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    if _ENUM in value:
        return _find(value[_ENUM])[value["name"]]
    entries = {key: from_portable(entry) for key, entry in value.items() if key != _DATACLASS}
    return _find(value[_DATACLASS])(**entries) if _DATACLASS in value else entries


def _name_of(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _find(name: str) -> Any:
    module, _, qualname = name.partition(":")
    return getattr(importlib.import_module(module), qualname)
