"""Helpers that the sections of the configuration share."""

from __future__ import annotations

import dataclasses
import math
from enum import Enum
from typing import Any

from distaccum.errors import require

MISSING: Any = "???"
"""OmegaConf's mark for a value that must be given (the same string as `omegaconf.MISSING`)."""


def require_name(group: str, name: str, *own: str) -> None:
    """Refuses a section's `name` that is another option's: the option is chosen by the group."""
    require(
        name in own, f"{group}.name={name} can't be set: it follows from the choice of {group}. Set {group}={name}."
    )


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Returns a configuration's values by their full keys."""
    if not isinstance(value, dict):
        return {key: value}
    return {
        path: leaf for name, entry in value.items() for path, leaf in flat(entry, f"{key}.{name}".lstrip(".")).items()
    }


def finite(value: Any) -> Any:
    """Returns a nest of plain values with None for numbers that are not finite, as JSON has none."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_plain(config: Any) -> Any:
    """Returns a configuration as dictionaries, lists, strings, numbers and None."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {entry.name: as_plain(getattr(config, entry.name)) for entry in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {key: as_plain(value) for key, value in config.items()}
    if isinstance(config, list):
        return [as_plain(value) for value in config]
    return config.name if isinstance(config, Enum) else config
