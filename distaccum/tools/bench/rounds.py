"""Sums up one turn of a measurement over its ranks."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One turn of one placement."""

    seconds: float
    """Median over the timed updates; an update takes as long as on its slowest rank."""
    data_share: float
    sync_share: float
    samples: int
    sync_calls: int
    sync_bytes: int
    sync_by_axis: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Both numbers by axis of the ranks (`Traffic.by_axis`)."""


def round_of(answers: Sequence[dict[str, Any]]) -> Round:
    """Sums up what each rank has timed in one turn."""
    slowest = [max(of_ranks) for of_ranks in zip(*(answer["seconds"] for answer in answers), strict=True)]

    def mean_share(name: str) -> float:
        shares = [sum(answer[name]) / sum(answer["seconds"]) for answer in answers]
        return statistics.fmean(shares)

    data_share = min(1.0, max(0.0, mean_share("data_seconds")))
    return Round(
        seconds=statistics.median(slowest),
        data_share=data_share,
        sync_share=min(1.0 - data_share, max(0.0, mean_share("sync_seconds"))),
        samples=answers[0]["samples"],
        sync_calls=max(answer["sync_calls"] for answer in answers),
        sync_bytes=max(answer["sync_bytes"] for answer in answers),
        sync_by_axis=_most([answer.get("sync_by_axis", {}) for answer in answers]),
    )


def _most(of_ranks: Sequence[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """Returns by axis the most calls and the most bytes of a rank."""
    axes = dict.fromkeys(axis for of_rank in of_ranks for axis in of_rank)
    pairs = {axis: [of_rank[axis] for of_rank in of_ranks if axis in of_rank] for axis in axes}
    return {axis: (max(calls for calls, _ in own), max(size for _, size in own)) for axis, own in pairs.items()}


def middle_half(values: Sequence[float]) -> tuple[float, float]:
    """Returns the first and the third quartile, interpolated between values.

    >>> middle_half([1.0, 2.0, 3.0, 4.0, 100.0])
    (2.0, 4.0)
    """
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def milliseconds(seconds: float) -> str:
    """Returns a short time as text, in a fitting unit.

    >>> milliseconds(0.03456), milliseconds(3.456), milliseconds(0.0003456)
    ('34.6 ms', '3.46 s', '0.346 ms')
    """
    value, unit = (seconds, "s") if seconds >= 1 else (seconds * 1e3, "ms")
    return f"{value:#.3g}".removesuffix(".") + f" {unit}" if value < 1000 else f"{value:,.0f} {unit}"
