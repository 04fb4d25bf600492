"""What of a checkpoint's configuration may be built: anybody may have written it, so it is data."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from distaccum.config import instantiate as targets
from distaccum.errors import UserError

_OWN = ("distaccum.data", "distaccum.models", "distaccum.tasks")
"""Nothing in these runs or builds what it is given the name of."""


def check_trusted(config: dict[str, Any], given: Collection[str], trusted: Collection[str]) -> None:
    """Refuses what is neither of this package, nor trusted, nor on the command line. Nothing of it is imported.

    Args:
        config: the sections that are to be built.
        given: keys that stand on the command line.
        trusted: import paths of modules, and of single classes and functions.

    Raises:
        UserError: names what is to be built, and how to allow it; or a value that would be worked out here, as
            `${oc.env:…}`, in the place of which a run saves what it was.
    """
    for key, value in _leaves(config):
        if not isinstance(value, str) or any(f"{key}.".startswith(f"{own}.") for own in given):
            continue
        if "${" in value:
            raise UserError(f"{key}={value} in the checkpoint is no value that a run has saved. Give it, as in {key}=…")
        if key.endswith(f".{targets.TARGET}") and not _is_trusted(value, key, trusted):
            raise UserError(
                f"{key}={value} is what the checkpoint wants to be called here, and whoever made it could have put "
                f"anything there. If you know it, say so: --trust {value}, or --trust {value.partition('.')[0]} for "
                "all of that package."
            )


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        for name, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(entry, f"{key}.{name}".lstrip("."))
    else:
        yield key, value


def _is_trusted(target: str, key: str, trusted: Collection[str]) -> bool:
    if target in trusted:
        return True
    homes = tuple(f"{home}." for home in (*_OWN, *trusted))
    if not target.startswith(homes):
        return False
    # The names in a module lead on to what it has imported: what counts is where the thing is at home.
    found = targets.locate(target, key.removesuffix(f".{targets.TARGET}"))
    return f"{getattr(found, '__module__', '')}.".startswith(homes)
