"""Changes a configured strategy to another one, and says by which overrides."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from distaccum.config import StrategyConfig, as_plain


def placed(
    given: StrategyConfig, kind: type[StrategyConfig], settings: Mapping[str, Any]
) -> tuple[StrategyConfig, list[str]]:
    """Returns a strategy with certain values, and the overrides that make it of the configured one.

    Args:
        given: the configured strategy; if it is of this kind, other keys keep its values.

    >>> from distaccum.config import DDPConfig, SingleConfig
    >>> placed(SingleConfig(), DDPConfig, {"shard_optimizer": True})[1]
    ['strategy=ddp', 'strategy.shard_optimizer=true']
    """
    default = kind()
    base = given if isinstance(given, kind) else default
    overrides = [f"strategy={default.name}"]
    overrides += [
        f"strategy.{key}={'null' if value is None else str(as_plain(value)).lower()}"
        for key, value in settings.items()
        if value != getattr(default, key) or value != getattr(base, key)
    ]
    return dataclasses.replace(base, **settings), overrides


def half_of(world_size: int) -> int:
    """Returns the most ranks of two or more nodes with equally many, for as many ranks as two or more.

    >>> half_of(2), half_of(8), half_of(9)
    (1, 4, 3)
    """
    return max(size for size in range(1, world_size // 2 + 1) if world_size % size == 0)
