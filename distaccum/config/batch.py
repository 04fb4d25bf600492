"""Configuration of the windows, of how they are cut, and of the data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distaccum.config.basics import MISSING
from distaccum.config.enums import Balance, BatchSchedule, LrRule, TableUnit
from distaccum.errors import require, require_at_least

AUTO = "auto"

_KEYS_OF_SCHEDULES: dict[BatchSchedule, tuple[tuple[str, ...], tuple[str, ...]]] = {
    BatchSchedule.constant: ((), ()),
    BatchSchedule.table: (("table",), ("table_unit", "lr_rule", "weight_decay_rule")),
    BatchSchedule.ramp: (("ramp_from", "ramp_updates"), ("lr_rule", "weight_decay_rule")),
    BatchSchedule.noise: (("min_size", "max_size"), ("lr_rule", "weight_decay_rule")),
}
"""By schedule: the keys that it needs, and those that it may have."""


@dataclass(kw_only=True, slots=True)
class BatchConfig:
    """The samples of one update, and how they are cut into micro-batches. See `distaccum.planning.resolve_batch`."""

    global_batch_size: int | None = 256
    """Samples per update, over all ranks. `null` if micro-batch size and accumulation steps are given instead."""
    micro_batch_size: int | str | None = None
    """Largest number of samples in one forward and backward on one rank. `null`: follows from the accumulation steps;
    16 if those aren't given either. `auto`: the largest that fits into memory, found at the start with the costliest
    samples and remembered; when memory runs out later, the run goes on with smaller ones."""
    auto_memory: float = 0.8
    """Fraction of the free memory that `batch.micro_batch_size=auto` may use where it can't try sizes out: on a CPU,
    and where ranks must take equal micro-steps (FSDP, `static_graph`, SyncBatchNorm)."""
    accumulation_steps: int | None = None
    """Micro-steps per update and rank. `null`: follows from the micro-batch size."""
    drop_last: bool = False
    """Leave out an epoch's last window when it is smaller than the global batch."""
    balance: Balance = Balance.even
    """`even`: ranks get equal shares of each window; `speed`: shares in proportion to their measured speed, so that
    unequal GPUs finish together."""
    schedule: BatchSchedule = BatchSchedule.constant
    """How the samples per update change during the run. `constant`: they don't; `table`: as `table` lists; `ramp`:
    linearly from `ramp_from` to `global_batch_size`; `noise`: they begin with `global_batch_size` and follow the
    measured noise scale between `min_size` and `max_size`."""
    table: list[list[int]] = field(default_factory=list)
    """With `batch.schedule=table`: pairs of the update (from 1) or epoch (from 0) at which a size begins, and the size
    in samples per update: `[[100, 128], [500, 256]]`. Before the first entry it is `global_batch_size`."""
    table_unit: TableUnit = TableUnit.update
    """Unit of the first number of each pair: `update` or `epoch`."""
    ramp_from: int | None = None
    """With `batch.schedule=ramp`: samples of the first update."""
    ramp_updates: int | None = None
    """With `batch.schedule=ramp`: updates until the samples per update have reached `global_batch_size`."""
    min_size: int | None = None
    """With `batch.schedule=noise`: fewest samples per update. All sizes but `max_size` are multiples of it."""
    max_size: int | None = None
    """With `batch.schedule=noise`: most samples per update."""
    lr_rule: LrRule = LrRule.none
    """How the learning rate follows the samples per update: in proportion (`linear`), to their square root (`sqrt`), or
    not at all (`none`). At `global_batch_size` it is that of the optimizer and its schedule."""
    weight_decay_rule: LrRule = LrRule.none
    """The same for weight decay: `sqrt` with `batch.lr_rule=sqrt`, and `linear` with `batch.lr_rule=none`, keep AdamW's
    time scale in samples (Wang and Aitchison 2024)."""

    def __post_init__(self) -> None:
        size = self.micro_batch_size
        require_at_least(
            1,
            batch__global_batch_size=self.global_batch_size,
            batch__micro_batch_size=size if type(size) is int else None,
            batch__accumulation_steps=self.accumulation_steps,
        )
        require(
            size is None or type(size) is int or size == AUTO,
            f"batch.micro_batch_size={size} is impossible: it takes a whole number, auto or null.",
        )
        require(
            0 < self.auto_memory <= 1,
            f"batch.auto_memory={self.auto_memory} is impossible: it must be above 0 and at most 1.",
        )
        self._check_schedule()
        if not self.is_auto:
            return
        require(
            self.global_batch_size is not None,
            "batch.micro_batch_size=auto needs the size of a window: set batch.global_batch_size.",
        )
        require(
            self.accumulation_steps is None,
            f"batch.micro_batch_size=auto decides how many micro-steps there are, and batch.accumulation_steps="
            f"{self.accumulation_steps} is given too: leave one of them out (null).",
        )

    def _check_schedule(self) -> None:
        needed, optional = _KEYS_OF_SCHEDULES[self.schedule]
        name = self.schedule.name
        keys = (
            "table",
            "table_unit",
            "ramp_from",
            "ramp_updates",
            "min_size",
            "max_size",
            "lr_rule",
            "weight_decay_rule",
        )
        for key in keys:
            value = getattr(self, key)
            is_given = value not in (None, [], TableUnit.update, LrRule.none)
            require(
                not is_given or key in needed + optional,
                f"batch.{key}={value} means nothing with batch.schedule={name}: leave it out, or choose the schedule "
                "that it belongs to.",
            )
            require(is_given or key not in needed, f"batch.schedule={name} needs batch.{key}: give it.")
        if self.schedule is BatchSchedule.constant:
            return
        require(
            self.global_batch_size is not None,
            f"batch.schedule={name} starts from a size that is given, and batch.global_batch_size is null: set it.",
        )
        require(
            self.accumulation_steps is None,
            f"batch.accumulation_steps={self.accumulation_steps} can't be given with batch.schedule={name}, as "
            "micro-batches would grow with the window: give batch.micro_batch_size instead.",
        )
        require_at_least(1, batch__ramp_from=self.ramp_from, batch__ramp_updates=self.ramp_updates)
        require_at_least(1, batch__min_size=self.min_size)
        first = 0 if self.table_unit is TableUnit.epoch else 1
        for entry in self.table:
            require(
                len(entry) == 2 and entry[0] >= first and entry[-1] >= 1,
                f"batch.table has the entry {entry}, which is impossible: it takes pairs of one "
                f"{self.table_unit.name} and a size; {self.table_unit.name}s are counted from {first}, "
                "and sizes are at least 1.",
            )
        begins = [entry[0] for entry in self.table]
        require(len(set(begins)) == len(begins), f"batch.table={self.table} has two sizes for one and the same begin.")
        if self.min_size is not None and self.max_size is not None and self.global_batch_size is not None:
            require(
                self.min_size <= self.global_batch_size <= self.max_size,
                f"batch.schedule=noise begins with batch.global_batch_size={self.global_batch_size}, which is not "
                f"between batch.min_size={self.min_size} and batch.max_size={self.max_size}.",
            )

    @property
    def cut(self) -> str:
        """The name of this choice: how windows are cut."""
        return "uniform"

    @property
    def is_auto(self) -> bool:
        """Whether the size of micro-batches is found on the machine."""
        return self.micro_batch_size == AUTO

    @property
    def given_size(self) -> int | None:
        """The size of micro-batches, if it is given as a number."""
        return self.micro_batch_size if isinstance(self.micro_batch_size, int) else None


@dataclass(kw_only=True, slots=True)
class ByLengthBatchConfig(BatchConfig):
    """Samples of similar length share a micro-batch, within each window: little is padded, and the update is the same.

    The windows are those of `batch=uniform`, so sampling is exactly as random. Lengths are the dataset's attribute
    `lengths` (a number for each sample), or are found once by loading every sample.
    """

    max_tokens: int | None = None
    """Most tokens in a micro-batch, padding included. `null`: `micro_batch_size` times the longest sample, for which
    `batch=uniform` needs memory too."""
    measure_costs: bool = True
    """Fit the cost of a micro-batch (linear and quadratic in its length, and a constant) to measured micro-steps at
    updates 4, 16 and 64, and cut accordingly. `false`: a fixed cost, so that the same command gives the same bits."""

    def __post_init__(self) -> None:
        BatchConfig.__post_init__(self)
        require_at_least(1, batch__max_tokens=self.max_tokens)
        require(
            not (self.is_auto and self.max_tokens is not None),
            f"batch.micro_batch_size=auto finds how many tokens fit, and batch.max_tokens={self.max_tokens} is given "
            "too: leave one of them out.",
        )
        require(
            self.accumulation_steps is None,
            f"batch.accumulation_steps={self.accumulation_steps} can't be given with batch={self.cut}: the number of "
            "micro-steps follows from the lengths. Leave it out, or set batch=uniform.",
        )

    @property
    def cut(self) -> str:
        return "by_length"


@dataclass(kw_only=True, slots=True)
class PackedBatchConfig(ByLengthBatchConfig):
    """The samples of a micro-batch are put end to end, within each window: nothing is padded, and the update is the
    same.

    Positions begin anew with each sample and attention stays inside it, which the model must be able to do: before the
    first update, samples are computed packed and alone, and a model that gives something else is refused. The windows
    are those of `batch=uniform`. Lengths are found as with `batch=by_length`.
    """

    max_tokens: int | None = None
    """Most tokens in a micro-batch. `null`: `micro_batch_size` times the longest sample, for which `batch=uniform`
    needs memory too."""
    measure_costs: bool = True
    """Fit the costs of a token and of attention, which grow with Σ length and Σ length², to measured micro-steps at
    updates 4, 16 and 64, and deal samples to ranks accordingly. `false`: a fixed cost, so that the same command gives
    the same bits."""

    @property
    def cut(self) -> str:
        return "packed"


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Two datasets and how they are loaded. Each is any map-style `torch.utils.data.Dataset`."""

    train: Any = MISSING
    """Component: the dataset to train on. Its attributes named like arguments of the model (`num_classes`,
    `input_shape`, `vocab_size`, …) are passed to the model, unless the configuration gives that argument."""
    evaluation: Any = None
    """Component: the dataset of the evaluations. `null`: no evaluation."""
    collate_fn: Any = None
    """Component: a function that makes a micro-batch of a list of samples. `null`: the dataset's attribute
    `collate_fn`, else stacking, with padding to the longest sample of the micro-batch."""
    num_workers: Any = 0
    """Worker processes per rank that load samples. 0: the training process loads them itself. `auto`: one for the first
    updates, then as many as it takes to load as fast as the training goes, as far as there are cores for them; none
    where samples are read faster than handed over."""
    pin_memory: bool | None = None
    """Load into page-locked memory, from which copies to the GPU can be asynchronous. `null`: yes on CUDA."""
    persistent_workers: bool | None = None
    """Keep the workers between epochs. `null`: yes if there are any."""
    prefetch_factor: int | None = None
    """Micro-batches that each worker loads ahead. `null`: torch's own default, 2; with `data.num_workers=auto` more
    where some take far longer to load than others."""
    non_blocking: bool = True
    """Copy to the GPU without waiting: the next micro-batch is copied while this one computes."""

    def __post_init__(self) -> None:
        count = self.num_workers
        require(
            type(count) is int or count == AUTO,
            f"data.num_workers={count} is impossible: it takes a whole number or auto.",
        )
        if type(count) is int:
            require_at_least(0, data__num_workers=count)
            require(count <= 4096, f"data.num_workers={count} is impossible: at most 4096.")
        require_at_least(1, data__prefetch_factor=self.prefetch_factor)
        for key in ("persistent_workers", "prefetch_factor"):
            require(
                not (getattr(self, key) and self.num_workers == 0),
                f"data.{key}={getattr(self, key)} needs worker processes, and data.num_workers is 0: "
                f"set data.num_workers, or leave data.{key} out.",
            )
