"""Comparisons made up by hand, for tests of what is said about them."""

from __future__ import annotations

from functools import cache
from typing import Any

from distaccum.config import TrainConfig, as_plain
from distaccum.config.compose import compose
from distaccum.config.tools import PlacementName
from distaccum.tools.bench.environment import environment
from distaccum.tools.bench.rounds import Round
from distaccum.tools.compare.placements import PLACEMENTS, Case
from distaccum.tools.compare.results import CompareReport, CompareRow, Reference, add_rounds, add_speedups, row_of

MIB = 2**20


@cache
def _config() -> TrainConfig:
    return compose([], "compare")


def case(name: str, world_size: int = 1, accumulation_steps: int = 4) -> Case:
    return Case(
        placement=PLACEMENTS[PlacementName[name]],
        world_size=world_size,
        accumulation_steps=accumulation_steps,
        shard_size=world_size // 2 if name == "fsdp_node" else None,
    )


def row(
    name: str,
    milliseconds: tuple[float, ...] = (),
    *,
    world_size: int = 1,
    accumulation_steps: int = 4,
    memory_mib: int = 400,
    calls: int = 0,
    sent: int = 0,
    error_float64: float | None = 1e-15,
    error: float | None = 1e-6,
    by_axis: dict[str, tuple[int, int]] | None = None,
    reason: str | None = None,
) -> CompareRow:
    of = case(name, world_size, accumulation_steps)
    made = row_of(of, of.command(_config()))
    made.reason = reason
    if reason is not None:
        return made
    add_rounds(
        made,
        [
            Round(
                seconds=value / 1e3,
                data_share=0.1,
                sync_share=0.2,
                samples=256,
                sync_calls=calls,
                sync_bytes=sent,
                sync_by_axis=by_axis or {},
            )
            for value in milliseconds
        ],
    )
    made.memory = [memory_mib * MIB] * made.num_processes
    made.memory_before = [200 * MIB] * made.num_processes
    made.memory_kind = "resident set"
    made.error_float64, made.error = error_float64, error
    made.loss_curve = [2.0, 1.5, 1.0 if not made.is_lossy else 1.4]
    made.micro_batch_sizes = [64] * accumulation_steps
    return made


def report(*rows: CompareRow, **changes: Any) -> CompareReport:
    add_speedups(rows)
    return CompareReport(
        **environment(),
        config=as_plain(_config()),
        reference=changes.pop("reference", Reference(parameters=1234)),
        rows=list(rows),
        **changes,
    )
