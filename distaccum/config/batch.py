"""The windows and how they are cut, and the data they are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distaccum.choices import Balance
from distaccum.config.basics import MISSING
from distaccum.errors import require, require_at_least

AUTO = "auto"


@dataclass(kw_only=True, slots=True)
class BatchConfig:
    """How many samples one update is made of, and how they are cut. See `distaccum.planning.resolve_batch`."""

    global_batch_size: int | None = 256
    """Samples per update, over all ranks. `null` if micro-batch size and accumulation steps are given instead."""
    micro_batch_size: int | str | None = None
    """Largest number of samples in one forward and backward on one rank. `null`: follows from the accumulation steps;
    16 if those aren't given either. `auto`: the largest that fits into memory, found at the start on the costliest
    samples and remembered; when memory runs out later, smaller ones take its place and the run goes on."""
    auto_memory: float = 0.8
    """Part of the free memory that `micro_batch_size=auto` may plan with where sizes can't simply be tried: on a CPU,
    and where ranks must take equal micro-steps (FSDP, `static_graph`, SyncBatchNorm)."""
    accumulation_steps: int | None = None
    """Micro-steps per update and rank. `null`: as many as the micro-batch size asks for."""
    drop_last: bool = False
    """Leave out an epoch's last window when it is smaller than the global batch."""
    balance: Balance = Balance.even
    """`even`: ranks get equal shares of each window; `speed`: shares in proportion to their measured speed, so that
    unequal GPUs finish together."""

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
            0 < self.auto_memory <= 1, f"batch.auto_memory={self.auto_memory} is impossible: it is a part, up to 1."
        )
        if not self.is_auto:
            return
        require(
            self.global_batch_size is not None,
            "batch.micro_batch_size=auto cuts windows of a size that is given: set batch.global_batch_size.",
        )
        require(
            self.accumulation_steps is None,
            f"batch.micro_batch_size=auto decides how many micro-steps there are, and batch.accumulation_steps="
            f"{self.accumulation_steps} is given too: leave one of them out (null).",
        )

    @property
    def is_auto(self) -> bool:
        """Whether the size of micro-batches is to be found on the machine."""
        return self.micro_batch_size == AUTO

    @property
    def given_size(self) -> int | None:
        """The size of micro-batches, if it is given as a number."""
        return self.micro_batch_size if isinstance(self.micro_batch_size, int) else None


@dataclass(kw_only=True, slots=True)
class ByLengthBatchConfig(BatchConfig):
    """Samples of like length share a micro-batch, within each window: little is padded, and the update is the same.

    The windows are those of `batch=uniform`, so sampling is exactly as random. Lengths are the dataset's attribute
    `lengths` (a number for each sample), or found once by loading every sample.
    """

    max_tokens: int | None = None
    """Most tokens in a micro-batch, padding included. `null`: `micro_batch_size` samples of the longest there is, which
    is what `batch=uniform` must have memory for."""
    measure_costs: bool = True
    """Fit what a micro-batch costs (linear and quadratic in its length, and a constant) to measured micro-steps, at
    updates 4, 16 and 64, and cut accordingly. `false`: a fixed guess, so that the same command gives the same bits."""

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
            f"batch.accumulation_steps={self.accumulation_steps} can't be given with batch=by_length: the number of "
            "micro-steps follows from the lengths. Leave it out, or set batch=uniform.",
        )


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Two datasets and how they are loaded. The datasets are any map-style `torch.utils.data.Dataset`."""

    train: Any = MISSING
    """Component: the dataset to train on. Attributes of it that bear the name of a model's argument (`num_classes`,
    `input_shape`, `vocab_size`, …) are passed to the model, unless the configuration gives that argument."""
    evaluation: Any = None
    """Component: the dataset of the evaluations. `null`: no evaluation."""
    collate_fn: Any = None
    """Component: a function that makes a micro-batch of a list of samples. `null`: the dataset's own `collate_fn`
    attribute, else stacking, with dynamic padding to the longest of the micro-batch."""
    num_workers: int = 0
    """Worker processes per rank that load samples. 0: the training process loads them itself."""
    pin_memory: bool | None = None
    """Load into page-locked memory, from where copies to the GPU are asynchronous. `null`: yes on CUDA."""
    persistent_workers: bool | None = None
    """Keep the workers between epochs. `null`: yes if there are any."""
    prefetch_factor: int | None = None
    """Micro-batches that each worker loads ahead. `null`: torch's own default, 2."""
    non_blocking: bool = True
    """Copy to the GPU without waiting; the next micro-batch is then copied while this one computes."""

    def __post_init__(self) -> None:
        require_at_least(0, data__num_workers=self.num_workers)
        require_at_least(1, data__prefetch_factor=self.prefetch_factor)
        for key in ("persistent_workers", "prefetch_factor"):
            require(
                not (getattr(self, key) and self.num_workers == 0),
                f"data.{key}={getattr(self, key)} needs worker processes, and data.num_workers is 0: "
                f"set data.num_workers, or leave data.{key} out.",
            )
