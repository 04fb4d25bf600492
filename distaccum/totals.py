"""What a run has done so far, and the records that observers are told of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distaccum.devices import peak_memory
from distaccum.loaders import Window
from distaccum.observers import EvaluationRecord, RunEnd, UpdateRecord
from distaccum.strategies import Strategy
from distaccum.updates import UpdateResult

_UPDATES_BETWEEN_MEMORY = 100


@dataclass(slots=True)
class Totals:
    """What has been done since the start of the run, before it was interrupted too."""

    updates: int = 0
    samples: int = 0
    skipped_updates: int = 0
    train_seconds: float = 0.0
    data_seconds: float = 0.0
    sync_seconds: float = 0.0

    def add(self, window: Window, result: UpdateResult) -> None:
        """Counts one more update."""
        self.updates += 1
        self.samples += window.num_samples
        self.skipped_updates += result.skipped
        self.train_seconds += result.seconds
        self.data_seconds += result.data_seconds
        self.sync_seconds += result.sync_seconds

    def shares(self) -> tuple[float, float, float]:
        """Shares of the time in updates that went into data, computing and sync; they add up to 1."""
        seconds = self.train_seconds or 1.0
        # Clocks differ a little, so a share may come out a hair below 0 or above 1.
        data = min(1.0, self.data_seconds / seconds)
        sync = min(1.0 - data, self.sync_seconds / seconds)
        return data, 1.0 - data - sync, sync

    def record(
        self, window: Window, result: UpdateResult, metrics: dict[str, float], lr: float, device: torch.device
    ) -> UpdateRecord:
        """The record of the update that was counted last."""
        # The peak hardly moves after the first updates, and asking for it takes a tenth of a millisecond.
        has_memory = self.updates & (self.updates - 1) == 0 or self.updates % _UPDATES_BETWEEN_MEMORY == 0
        return UpdateRecord(
            update=self.updates,
            epoch=window.epoch,
            samples=self.samples,
            loss=result.loss,
            metrics=metrics,
            grad_norm=result.grad_norm,
            lr=lr,
            micro_steps=result.micro_steps,
            weight=result.weight,
            update_seconds=result.seconds,
            samples_per_second=window.num_samples / result.seconds,
            data_seconds=result.data_seconds,
            sync_seconds=result.sync_seconds,
            sync_calls=result.sync_calls,
            sync_bytes=result.sync_bytes,
            skipped=result.skipped,
            peak_memory_bytes=peak_memory(device)[0] if has_memory else None,
        )

    def end(
        self,
        strategy: Strategy,
        *,
        evaluation: EvaluationRecord | None,
        total_seconds: float,
        run_dir: Path | None,
        **how: Any,
    ) -> RunEnd:
        """The record of the run's end. All ranks call it.

        Args:
            how: why it ended, and whether it is saved, as `RunEnd` has it.
        """
        data, compute, sync = self.shares()
        memory, kind = largest_peak_memory(strategy)
        return RunEnd(
            updates=self.updates,
            samples=self.samples,
            skipped_updates=self.skipped_updates,
            evaluation=evaluation,
            train_seconds=self.train_seconds,
            total_seconds=total_seconds,
            samples_per_second=self.samples / (self.train_seconds or 1.0),
            data_share=data,
            compute_share=compute,
            sync_share=sync,
            peak_memory_bytes=memory,
            peak_memory_kind=kind,
            run_dir=run_dir,
            **how,
        )


def largest_peak_memory(strategy: Strategy) -> tuple[int, str]:
    """Bytes at the highest point on the rank that used most, and what they are, in words."""
    memory, kind = peak_memory(strategy.device)
    if strategy.process_group is None:
        return memory, kind
    largest = torch.tensor(memory, dtype=torch.int64, device=strategy.device)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=strategy.process_group)
    return int(largest), f"{kind}, on the rank that used most"
