"""What a run has done so far, and the records that observers are told of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distaccum.accumulation.result import UpdateResult
from distaccum.loaders import Window
from distaccum.observers import EvaluationRecord, RunEnd, UpdateRecord
from distaccum.runtime.memory import peak_memory
from distaccum.strategies import Strategy

COMPILED = "compiled"
"""The accumulator's flag of a rank that compiles, for which the others wait."""
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
    warm_up_updates: int = 0
    """Those in which a rank compiled. They are not in the shares, nor in the samples per second."""
    warm_up_samples: int = 0
    warm_up_seconds: float = 0.0
    compile_seconds: float = 0.0
    """Part of the warm-up that was spent compiling, on this rank."""

    def add(self, window: Window, result: UpdateResult, compile_seconds: float = 0.0) -> None:
        """Counts one more update.

        Args:
            compile_seconds: of it, spent compiling on this rank.
        """
        self.updates += 1
        self.samples += window.num_samples
        self.skipped_updates += result.skipped
        self.train_seconds += result.seconds
        if compile_seconds or COMPILED in result.flags:
            self.warm_up_updates += 1
            self.warm_up_samples += window.num_samples
            self.warm_up_seconds += result.seconds
            self.compile_seconds += compile_seconds
            return
        self.data_seconds += result.data_seconds
        self.sync_seconds += result.sync_seconds

    def samples_per_second(self) -> float:
        """Without the warm-up, unless there was nothing else."""
        samples, seconds = self.samples - self.warm_up_samples, self.train_seconds - self.warm_up_seconds
        return samples / seconds if samples else self.samples / (self.train_seconds or 1.0)

    def shares(self) -> tuple[float, float, float]:
        """Shares of the time in updates that went into data, computing and sync; they add up to 1."""
        seconds = self.train_seconds - self.warm_up_seconds or 1.0
        # Clocks differ a little, so a share may come out a hair below 0 or above 1.
        data = min(1.0, self.data_seconds / seconds)
        sync = min(1.0 - data, self.sync_seconds / seconds)
        return data, 1.0 - data - sync, sync

    def record(
        self,
        window: Window,
        result: UpdateResult,
        metrics: dict[str, float],
        lr: float,
        device: torch.device,
        compile_seconds: float = 0.0,
    ) -> UpdateRecord:
        """The record of the update that was counted last."""
        # The peak hardly moves after the first updates, and asking for it takes a tenth of a millisecond.
        has_memory = self.updates & (self.updates - 1) == 0 or self.updates % _UPDATES_BETWEEN_MEMORY == 0
        return UpdateRecord(
            update=self.updates,
            epoch=window.epoch,
            samples=self.samples,
            window_samples=window.num_samples,
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
            compile_seconds=compile_seconds,
            noise_scale=result.noise_scale,
            noise_scale_error=result.noise_scale_error,
            coherence=result.coherence,
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
            samples_per_second=self.samples_per_second(),
            warm_up_updates=self.warm_up_updates,
            warm_up_seconds=self.warm_up_seconds,
            compile_seconds=self.compile_seconds,
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
