"""The results of a comparison: its rows, and the statistics that fill them from the ranks' answers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from distaccum.config.tools import PlacementName
from distaccum.tools.bench.environment import Circumstances
from distaccum.tools.bench.rounds import Round, middle_half
from distaccum.tools.compare.placements import Case


@dataclass(kw_only=True, slots=True)
class CompareRow:
    """The results of one placement with its numbers. What was not measured is None or NaN."""

    key: str
    placement: str
    title: str
    world_size: int
    accumulation_steps: int
    num_processes: int
    is_lossy: bool
    command: str
    """The command that trains like this; for the placement without `no_sync`, the one with it."""
    is_uniform: bool = False
    """Cut into equal micro-batches, where the others are cut by length."""
    reason: str | None = None
    """Why it could not be run, or None."""
    notes: list[str] = field(default_factory=list)
    """What else went wrong."""
    error_float64: float | None = None
    """‖difference‖ / ‖value‖ of the parameters' change, computed in float64, from the float64 one-shot run's."""
    error: float | None = None
    """The same, computed in the configured precision."""
    round_seconds: list[float] = field(default_factory=list)
    """The median seconds per update of each round."""
    seconds: float = math.nan
    """Seconds per update of the full window's size: the median over the rounds."""
    low_seconds: float = math.nan
    """First quartile over the rounds."""
    high_seconds: float = math.nan
    """Third quartile over the rounds."""
    samples_per_second: float = math.nan
    speedup: float | None = None
    """Against single accumulation with as many steps, or else its fastest."""
    data_share: float = math.nan
    """Share of the time that was spent waiting for micro-batches."""
    compute_share: float = math.nan
    sync_share: float = math.nan
    """Share that was spent waiting for the network and for other ranks."""
    sync_calls: int | None = None
    """Collectives that carried gradients, per update and rank."""
    sync_bytes: int | None = None
    """Bytes handed to them, per update and rank."""
    sync_by_axis: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Both by axis of the ranks: `shard`, inside a node, and `replicate`, between nodes. Empty where there is one."""
    micro_batch_sizes: list[int] = field(default_factory=list)
    """Rank 0's micro-batches of a full window."""
    memory: list[int] = field(default_factory=list)
    """Peak of each process in bytes."""
    memory_before: list[int] = field(default_factory=list)
    """Peak of each process before there were data and a model: Python and torch."""
    memory_kind: str = ""
    loss_curve: list[float] = field(default_factory=list)

    @property
    def is_measured(self) -> bool:
        """Whether it was timed to the end."""
        return self.reason is None

    @property
    def peak_memory(self) -> int:
        """Peak of the process that used most."""
        return max(self.memory)


@dataclass(kw_only=True, slots=True)
class Reference:
    """The float64 run whose update the others are compared with."""

    accumulation_steps: int = 1
    """1: one shot."""
    parameters: int = 0
    """Numbers in the model's parameters."""
    problem: str | None = None
    """Why there is none, or None."""


@dataclass(kw_only=True, slots=True)
class CompareReport(Circumstances):
    """The content of `compare.json`."""

    reference: Reference
    rows: list[CompareRow]
    on_cuda: bool = False
    advice: list[str] = field(default_factory=list)
    """What to use here and why, a paragraph each."""
    seconds: float = 0.0
    """How long the comparison took."""

    @property
    def measured(self) -> list[CompareRow]:
        """Rows that have been timed."""
        return [row for row in self.rows if row.is_measured]


def row_of(case: Case, command: str = "") -> CompareRow:
    """Returns an empty row."""
    return CompareRow(
        key=case.key,
        placement=case.placement.name.value,
        title=case.title,
        world_size=case.world_size,
        accumulation_steps=case.accumulation_steps,
        num_processes=case.num_processes,
        is_lossy=case.placement.is_lossy,
        command=command,
        is_uniform=case.is_uniform,
        reason=case.impossible,
    )


def add_preparation(row: CompareRow, answers: Sequence[dict[str, Any]]) -> None:
    """Fills in the loss curve and the memory."""
    row.loss_curve = answers[0]["loss_curve"]
    row.micro_batch_sizes = answers[0]["micro_batch_sizes"]
    row.memory = [answer["peak_memory"] for answer in answers]
    row.memory_before = [answer["memory_before"] for answer in answers]
    row.memory_kind = answers[0]["memory_kind"]


def add_rounds(row: CompareRow, rounds: Sequence[Round]) -> None:
    """Fills in times, shares and traffic."""
    if not rounds:
        return
    row.round_seconds = [turn.seconds for turn in rounds]
    row.seconds = statistics.median(row.round_seconds)
    row.low_seconds, row.high_seconds = middle_half(row.round_seconds)
    row.samples_per_second = rounds[0].samples / row.seconds
    row.data_share = statistics.median(turn.data_share for turn in rounds)
    row.sync_share = statistics.median(turn.sync_share for turn in rounds)
    row.compute_share = 1.0 - row.data_share - row.sync_share
    row.sync_calls = rounds[-1].sync_calls
    row.sync_bytes = rounds[-1].sync_bytes
    row.sync_by_axis = rounds[-1].sync_by_axis


def add_speedups(rows: Sequence[CompareRow]) -> None:
    """Fills in how many times as fast each row is as accumulation in one process, cut as configured."""
    baselines = {
        row.accumulation_steps: row.seconds
        for row in rows
        if row.placement == PlacementName.single.value and row.is_measured and not row.is_uniform
    }
    for row in rows:
        if row.is_measured and baselines:
            row.speedup = baselines.get(row.accumulation_steps, min(baselines.values())) / row.seconds


def by_axis(row: CompareRow) -> list[tuple[int, int]]:
    """Returns collectives and bytes of an update inside a node and between nodes, or, with one axis, of all."""
    if not row.sync_by_axis:
        return [(row.sync_calls or 0, row.sync_bytes or 0)]
    return [row.sync_by_axis.get(axis, (0, 0)) for axis in ("shard", "replicate")]


def is_within_noise(row: CompareRow, other: CompareRow) -> bool:
    """Returns whether the middle halves of both rows' rounds overlap, so that their order may be chance."""
    (low, high), (other_low, other_high) = (middle_half(one.round_seconds) for one in (row, other))
    return low <= other_high and other_low <= high
