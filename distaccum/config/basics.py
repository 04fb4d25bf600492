"""What the sections of the configuration share."""

from __future__ import annotations

from typing import Any

from distaccum.errors import require

MISSING: Any = "???"
"""OmegaConf's mark for a value that must be given (the same string as `omegaconf.MISSING`)."""


def require_name(group: str, name: str, *own: str) -> None:
    """A section's name says which option of its group it is: it can't become another by being renamed."""
    require(
        name in own, f"{group}.name={name} can't be set: it follows from the choice of {group}. Set {group}={name}."
    )


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """A configuration's values by their full keys."""
    if not isinstance(value, dict):
        return {key: value}
    return {
        path: leaf for name, entry in value.items() for path, leaf in flat(entry, f"{key}.{name}".lstrip(".")).items()
    }
