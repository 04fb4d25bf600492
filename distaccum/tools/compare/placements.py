"""The placements that are compared, each for several numbers of ranks and of accumulation steps."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from distaccum.config import (
    BatchConfig,
    ByLengthBatchConfig,
    DDPConfig,
    DPConfig,
    FSDPConfig,
    SingleConfig,
    StrategyConfig,
    TrainConfig,
)
from distaccum.config.enums import Accumulate, Compression
from distaccum.config.tools import CompareConfig, PlacementName
from distaccum.errors import UserError
from distaccum.tools.bench.placing import half_of, placed


@dataclass(frozen=True, slots=True)
class Placement:
    """One way to place a training, for any number of ranks and accumulation steps."""

    name: PlacementName
    title: str
    """Its usual name."""
    strategy: type[StrategyConfig]
    settings: dict[str, Any] = field(default_factory=dict)
    """Values of the strategy's keys; the others are as configured."""
    syncs_every_step: bool = False

    @property
    def is_single(self) -> bool:
        """Whether it is one model on one device, where there is nothing to vary but the accumulation steps."""
        return self.strategy is SingleConfig

    @property
    def has_ranks(self) -> bool:
        """Whether it has a process for each rank, as under torchrun; the others are one process."""
        return self.strategy in (DDPConfig, FSDPConfig)

    @property
    def is_lossy(self) -> bool:
        """Whether it is not meant to be exact."""
        return self.settings.get("compression", Compression.none) is not Compression.none


_P = PlacementName
_EXACT: dict[str, Any] = {"compression": Compression.none, "shard_optimizer": False}
# Compressing from the first update that PowerSGD allows: it is there to be measured.
_POWERSGD = {**_EXACT, "compression": Compression.powersgd, "powersgd_start_update": 2}
_WHOLE: dict[str, Any] = {"reshard_in_window": True, "accumulate": Accumulate.whole}
_SHARDED = {**_WHOLE, "accumulate": Accumulate.sharded, "shard_size": None}
PLACEMENTS: dict[PlacementName, Placement] = {
    placement.name: placement
    for placement in (
        Placement(_P.one_shot, "one shot", SingleConfig),
        Placement(_P.single, "accumulation", SingleConfig),
        Placement(_P.dp, "DP", DPConfig),
        Placement(_P.ddp_sync_every_step, "DDP, sync every step", DDPConfig, _EXACT, syncs_every_step=True),
        Placement(_P.ddp, "DDP, no_sync", DDPConfig, _EXACT),
        Placement(_P.ddp_bf16, "DDP, bf16", DDPConfig, {**_EXACT, "compression": Compression.bf16}),
        Placement(_P.ddp_fp16, "DDP, fp16", DDPConfig, {**_EXACT, "compression": Compression.fp16}),
        Placement(_P.ddp_powersgd, "DDP, PowerSGD", DDPConfig, _POWERSGD),
        Placement(_P.zero1, "DDP, ZeRO-1", DDPConfig, {**_EXACT, "shard_optimizer": True}),
        Placement(_P.fsdp, "FSDP", FSDPConfig, _WHOLE),
        Placement(_P.fsdp_gathered, "FSDP, kept gathered", FSDPConfig, {**_WHOLE, "reshard_in_window": False}),
        Placement(_P.fsdp_sharded, "FSDP, sharded", FSDPConfig, _SHARDED),
        Placement(_P.fsdp_node, "FSDP, node", FSDPConfig, {**_WHOLE, "accumulate": Accumulate.node}),
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A placement with its numbers: one row of the comparison."""

    placement: Placement
    world_size: int
    """Ranks, or replicas under DP."""
    accumulation_steps: int
    """Micro-steps per window and rank. With `batch=by_length`, those of equal micro-batches that take as much memory
    for the longest samples; how many it takes follows from the lengths."""
    is_uniform: bool = False
    """Cut into equal micro-batches although the configuration cuts by length: to see what that gains."""
    shard_size: int | None = None
    """Ranks that share parameters as those of a node would, though all are on this host; None: all do."""
    impossible: str | None = None
    """Why it can't be run, or None."""

    @property
    def key(self) -> str:
        """Short, unique, and fit for the name of a file."""
        uniform = "_uniform" if self.is_uniform else ""
        return f"{self.placement.name.value}_{self.world_size}x{self.accumulation_steps}{uniform}"

    @property
    def num_processes(self) -> int:
        return self.world_size if self.placement.has_ranks else 1

    @property
    def title(self) -> str:
        """The placement and its numbers, in words.

        >>> from distaccum.config.tools import PlacementName
        >>> Case(placement=PLACEMENTS[PlacementName.ddp], world_size=2, accumulation_steps=4).title
        'DDP, no_sync · 2 ranks × 4'
        """
        if self.placement.name is PlacementName.one_shot:
            return self.placement.title
        if self.placement.is_single:
            title = f"{self.placement.title}, uniform" if self.is_uniform else self.placement.title
            return f"{title} · {self.accumulation_steps} step{'s' if self.accumulation_steps > 1 else ''}"
        what = "ranks" if self.placement.has_ranks else "replicas"
        node = "" if self.shard_size is None else f" of {self.shard_size}"
        return f"{self.placement.title}{node} · {self.world_size} {what} × {self.accumulation_steps}"

    def command(self, config: CompareConfig, overrides: Sequence[str] = ()) -> str:
        """Returns the command that trains like this.

        Args:
            overrides: the comparison's command line, of which all that belongs to the training is kept.
        """
        chosen = ["strategy", "batch.accumulation_steps", "batch.micro_batch_size", "run_dir"]
        chosen += [f"strategy.{key}" for key in self._settings]
        if self.is_uniform:
            chosen += ["batch", "batch.max_tokens", "batch.measure_costs"]
        kept = [
            entry
            for entry in overrides
            if entry.partition("=")[0].lstrip("+") not in chosen and not entry.lstrip("+").startswith("compare.")
        ]
        _, strategy = placed(config.strategy, self.placement.strategy, self._settings)
        if not isinstance(config.strategy, self.placement.strategy):
            kept = [entry for entry in kept if not entry.startswith("strategy.")]
        # Of the three numbers, the global batch and the steps are given: the third follows.
        free = "" if config.batch.micro_batch_size is None else " batch.micro_batch_size=null"
        cut = f"batch.accumulation_steps={self.accumulation_steps}{free}"
        if isinstance(config.batch, ByLengthBatchConfig) and not self.is_uniform:
            cut = f"batch.micro_batch_size={self._micro_batch_size(config.batch)}"
        launcher = f"torchrun --nproc_per_node={self.world_size}" if self.placement.has_ranks else "python"
        return f"{launcher} -m distaccum.train {shlex.join([*kept, *strategy])} {cut}"

    def configuration(self, config: CompareConfig) -> TrainConfig:
        """Returns the user's configuration with this placement and this cut."""
        batch = config.batch
        if self.is_uniform:
            batch = BatchConfig(**{entry.name: getattr(batch, entry.name) for entry in dataclasses.fields(BatchConfig)})
        if isinstance(batch, ByLengthBatchConfig):
            batch = dataclasses.replace(batch, micro_batch_size=self._micro_batch_size(batch))
        else:
            batch = dataclasses.replace(batch, micro_batch_size=None, accumulation_steps=self.accumulation_steps)
        strategy, _ = placed(config.strategy, self.placement.strategy, self._settings)
        return dataclasses.replace(config, batch=batch, strategy=strategy)

    @property
    def exact_updates(self) -> int:
        """Updates at the start that are not compressed, although the later ones are."""
        return int(self._settings.get("powersgd_start_update", 0))

    @property
    def _settings(self) -> dict[str, Any]:
        own: dict[str, Any] = {"replicas": self.world_size} if self.placement.strategy is DPConfig else {}
        if self.shard_size is not None:
            own["shard_size"] = self.shard_size
        return self.placement.settings | own

    def _micro_batch_size(self, batch: BatchConfig) -> int:
        assert batch.global_batch_size is not None
        return -(-batch.global_batch_size // (self.num_processes * self.accumulation_steps))


def cases_of(config: CompareConfig) -> list[Case]:
    """Returns the rows of a comparison, in the order in which they take their turns.

    A placement that none of the numbers fits, or that the configuration can't have, has a row too, which gives the
    reason.
    """
    section = config.compare
    names = list(PLACEMENTS) if section.placements is None else section.placements
    is_by_length = isinstance(config.batch, ByLengthBatchConfig)
    cases = []
    for placement in (PLACEMENTS[name] for name in PLACEMENTS if name in names):
        sizes = [size for size in section.world_sizes if (size == 1) == placement.is_single]
        steps = [1] if placement.name is PlacementName.one_shot else section.accumulation_steps
        if placement.name is PlacementName.single and PlacementName.one_shot in names:
            steps = [count for count in steps if count > 1]  # in a single micro-step it is the one shot
        if not sizes:
            wanted = "is one process" if placement.is_single else "needs two or more ranks"
            reason = f"{placement.title} {wanted}, and compare.world_sizes={section.world_sizes}"
            size = 1 if placement.is_single else 2
            first = section.accumulation_steps[0]
            cases.append(Case(placement=placement, world_size=size, accumulation_steps=first, impossible=reason))
        cases += [
            Case(
                placement=placement,
                world_size=size,
                accumulation_steps=count,
                is_uniform=is_uniform,
                shard_size=_shard_size(placement, size, config),
            )
            for size in sizes
            for count in steps
            for is_uniform in ((False, True) if is_by_length and placement.name is PlacementName.single else (False,))
        ]
    return [_unless_refused(case, config) for case in cases]


def _unless_refused(case: Case, config: CompareConfig) -> Case:
    """Returns a case; with the reason if the configuration can't have its placement, as packing can't have DP."""
    try:
        case.configuration(config)
    except UserError as error:
        return dataclasses.replace(case, impossible=str(error))
    return case


def _shard_size(placement: Placement, world_size: int, config: CompareConfig) -> int | None:
    """Returns the ranks of a node where a placement has nodes: half of all, unless the configuration says how many."""
    if placement.name is not PlacementName.fsdp_node:
        return None
    return getattr(config.strategy, "shard_size", None) or half_of(world_size)


def reference_case(accumulation_steps: int) -> Case:
    """Returns the float64 run that others are compared with: one shot, or cut if that does not fit into memory."""
    name = PlacementName.one_shot if accumulation_steps == 1 else PlacementName.single
    return Case(placement=PLACEMENTS[name], world_size=1, accumulation_steps=accumulation_steps)
