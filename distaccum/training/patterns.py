"""Finds parameters by shell-style patterns of their names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import cache

from torch import nn

from distaccum.errors import UserError

_ALIKE = 0.6
"""The likeness, from 0 to 1, from which `difflib` takes two words to be near."""


def parameters_like(module: nn.Module, pattern: str, key: str) -> list[nn.Parameter]:
    """Returns the parameters whose names in `named_parameters()` match a pattern (`embedding.*`, `blocks.[01].*`).

    Args:
        key: of the configuration, for the message.

    Raises:
        UserError: no name matches; the message lists near ones.
    """
    # A tied parameter has several names, any of which may be meant.
    named = list(module.named_parameters(remove_duplicate=False))
    found = [parameter for name, parameter in named if fnmatchcase(name, pattern)]
    if not found:
        names = [name for name, _ in named]
        near = _near(pattern, names)
        said = f"Near it are {', '.join(near)}" if near else f"There are {', '.join(names[:3])}, …, none near it"
        raise UserError(
            f"{key}: no parameter has a name like {pattern}. {said}; a pattern must match the whole name, and * stands "
            "for anything."
        )
    return found


def _near(pattern: str, names: Sequence[str]) -> list[str]:
    """Returns the three names that are most like a pattern, if any is.

    The parts between dots are compared, as a wildcard stands for parts of any length: each part of the pattern with
    that of the name which is most like it.
    """
    wanted = [word for part in pattern.split(".") if (word := re.sub(r"\[.*?\]|[*?]", "", part))]

    @cache
    def likeness(word: str, part: str) -> float:
        return difflib.SequenceMatcher(None, word, part).ratio()

    def score(name: str) -> float:
        return sum(max(likeness(word, part) for part in name.split(".")) for word in wanted) / max(1, len(wanted))

    scores = {name: found for name in names if (found := score(name)) >= _ALIKE}
    return sorted(scores, key=lambda name: (-scores[name], -likeness(pattern, name)))[:3]
