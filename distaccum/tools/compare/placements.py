"""The placements that are compared, each for several numbers of ranks and of accumulation steps."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

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
from distaccum.config.enums import Compression
from distaccum.config.tools import CompareConfig, PlacementName


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """One way to place a training, for any number of ranks and accumulation steps."""

    name: PlacementName
    title: str
    """Its usual name."""
    overrides: str
    """Its part of the command line of distaccum.train."""
    is_single: bool = False
    """One model on one device: there is nothing to vary but the accumulation steps."""
    has_ranks: bool = True
    """Started by torchrun; the others are one process."""
    is_lossy: bool = False
    """Not meant to be exact."""
    syncs_every_step: bool = False


_P = PlacementName
PLACEMENTS: dict[PlacementName, Placement] = {
    placement.name: placement
    for placement in (
        Placement(name=_P.one_shot, title="one shot", overrides="strategy=single", is_single=True, has_ranks=False),
        Placement(name=_P.single, title="accumulation", overrides="strategy=single", is_single=True, has_ranks=False),
        Placement(name=_P.dp, title="DP", overrides="strategy=dp", has_ranks=False),
        Placement(
            name=_P.ddp_sync_every_step, title="DDP, sync every step", overrides="strategy=ddp", syncs_every_step=True
        ),
        Placement(name=_P.ddp, title="DDP, no_sync", overrides="strategy=ddp"),
        Placement(
            name=_P.ddp_bf16, title="DDP, bf16", overrides="strategy=ddp strategy.compression=bf16", is_lossy=True
        ),
        Placement(
            name=_P.ddp_fp16, title="DDP, fp16", overrides="strategy=ddp strategy.compression=fp16", is_lossy=True
        ),
        Placement(
            name=_P.ddp_powersgd,
            title="DDP, PowerSGD",
            overrides="strategy=ddp strategy.compression=powersgd",
            is_lossy=True,
        ),
        Placement(name=_P.zero1, title="DDP, ZeRO-1", overrides="strategy=ddp strategy.shard_optimizer=true"),
        Placement(name=_P.fsdp, title="FSDP", overrides="strategy=fsdp"),
        Placement(
            name=_P.fsdp_gathered,
            title="FSDP, kept gathered",
            overrides="strategy=fsdp strategy.reshard_in_window=false",
        ),
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
        return f"{self.placement.title} · {self.world_size} {what} × {self.accumulation_steps}"

    def command(self, config: CompareConfig, overrides: Sequence[str] = ()) -> str:
        """Returns the command that trains like this.

        Args:
            overrides: the comparison's command line, of which all that belongs to the training is kept.
        """
        chosen = ["strategy", "batch.accumulation_steps", "batch.micro_batch_size", "run_dir"]
        is_by_length = isinstance(config.batch, ByLengthBatchConfig) and not self.is_uniform
        if self.is_uniform:
            chosen += ["batch", "batch.max_tokens", "batch.measure_costs"]
        kept = [
            entry
            for entry in overrides
            if entry.partition("=")[0].lstrip("+") not in chosen and not entry.lstrip("+").startswith("compare.")
        ]
        placed = self._strategy(config.strategy)
        if type(placed) is not type(config.strategy):
            kept = [entry for entry in kept if not entry.startswith("strategy.")]
        # Of the three numbers, the global batch and the steps are given: the third follows.
        free = "" if config.batch.micro_batch_size is None else " batch.micro_batch_size=null"
        cut = f"batch.accumulation_steps={self.accumulation_steps}{free}"
        if is_by_length:
            cut = f"batch.micro_batch_size={self._micro_batch_size(config.batch)}"
        launcher = f"torchrun --nproc_per_node={self.world_size}" if self.placement.has_ranks else "python"
        replicas = f" strategy.replicas={self.world_size}" if self.placement.name is PlacementName.dp else ""
        own = f"{shlex.join(kept)} " if kept else ""
        return f"{launcher} -m distaccum.train {own}{self.placement.overrides}{replicas} {cut}"

    def configuration(self, config: CompareConfig) -> TrainConfig:
        """Returns the user's configuration with this placement and this cut."""
        batch = config.batch
        if self.is_uniform:
            batch = BatchConfig(**{entry.name: getattr(batch, entry.name) for entry in dataclasses.fields(BatchConfig)})
        if isinstance(batch, ByLengthBatchConfig):
            batch = dataclasses.replace(batch, micro_batch_size=self._micro_batch_size(batch))
        else:
            batch = dataclasses.replace(batch, micro_batch_size=None, accumulation_steps=self.accumulation_steps)
        return dataclasses.replace(config, batch=batch, strategy=self._strategy(config.strategy))

    def exact_updates(self, config: CompareConfig) -> int:
        """Returns how many updates at the start are not compressed, although the later ones are."""
        placed = self._strategy(config.strategy)
        if isinstance(placed, DDPConfig) and placed.compression is Compression.powersgd:
            return placed.powersgd_start_update
        return 0

    def _micro_batch_size(self, batch: BatchConfig) -> int:
        assert batch.global_batch_size is not None
        ranks = self.world_size if self.placement.has_ranks else 1
        return -(-batch.global_batch_size // (ranks * self.accumulation_steps))

    def _strategy(self, given: StrategyConfig) -> StrategyConfig:
        name = self.placement.name
        if self.placement.is_single:
            return SingleConfig()
        if name is PlacementName.dp:
            dp = given if isinstance(given, DPConfig) else DPConfig()
            return dataclasses.replace(dp, replicas=self.world_size)
        if name in (PlacementName.fsdp, PlacementName.fsdp_gathered):
            fsdp = given if isinstance(given, FSDPConfig) else FSDPConfig()
            return dataclasses.replace(fsdp, reshard_in_window=name is PlacementName.fsdp)
        ddp = given if isinstance(given, DDPConfig) else DDPConfig()
        compression = {
            PlacementName.ddp_bf16: Compression.bf16,
            PlacementName.ddp_fp16: Compression.fp16,
            PlacementName.ddp_powersgd: Compression.powersgd,
        }.get(name, Compression.none)
        return dataclasses.replace(
            ddp,
            compression=compression,
            shard_optimizer=name is PlacementName.zero1,
            # Compressing from the first update that PowerSGD allows: it is there to be measured.
            powersgd_start_update=2 if compression is Compression.powersgd else ddp.powersgd_start_update,
        )


def cases_of(config: CompareConfig) -> list[Case]:
    """Returns the rows of a comparison, in the order in which they take their turns.

    A placement that none of the numbers fits has a row too, which gives the reason.
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
            Case(placement=placement, world_size=size, accumulation_steps=count, is_uniform=is_uniform)
            for size in sizes
            for count in steps
            for is_uniform in ((False, True) if is_by_length and placement.name is PlacementName.single else (False,))
        ]
    return cases


def reference_case(accumulation_steps: int) -> Case:
    """Returns the float64 run that others are compared with: one shot, or cut if that does not fit into memory."""
    name = PlacementName.one_shot if accumulation_steps == 1 else PlacementName.single
    return Case(placement=PLACEMENTS[name], world_size=1, accumulation_steps=accumulation_steps)
