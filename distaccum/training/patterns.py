"""Finds parameters by shell-style patterns of their names."""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase

from torch import nn

from distaccum.errors import UserError


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
        near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
        raise UserError(
            f"{key}: no parameter has a name like {pattern}. Near it are {', '.join(near)}; a pattern must match the "
            "whole name, and * stands for anything."
        )
    return found
