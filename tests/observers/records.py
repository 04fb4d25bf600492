"""Records as a trainer would make them, for tests that change a field or two."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from distaccum.accumulation import UpdateResult
from distaccum.observers import EvaluationRecord, RunEnd, RunStart, UpdateRecord

CONFIG = {"seed": 3, "batch": {"global_batch_size": 64}, "model": {"_target_": "m.Net", "sizes": [8, 4], "bias": None}}


def start(run_dir: Path | None, **changes: Any) -> RunStart:
    made = RunStart(
        run_dir=run_dir,
        plan="window 64 = 2 ranks × 4 micro-steps × 8; 1 sync per update",
        total_updates=180,
        updates_per_epoch=6,
        config=CONFIG,
    )
    return replace(made, **changes)


def update(number: int, **changes: Any) -> UpdateRecord:
    result = UpdateResult(
        loss=0.43121,
        grad_norm=1.0 / 3.0,
        micro_steps=4,
        weight=64.0,
        seconds=0.02,
        data_seconds=0.001,
        sync_seconds=0.002,
        sync_calls=2,
        sync_bytes=1024,
        skipped=False,
        sums={},
        flags=frozenset(),
        reports={},
        micro_seconds=(),
    )
    of_result = {name: value for name, value in changes.items() if name in UpdateResult.__dataclass_fields__}
    made = UpdateRecord(
        result=replace(result, **of_result),
        update=number,
        epoch=(number - 1) // 6,
        samples=number * 64,
        window_samples=64,
        metrics={"accuracy": 0.8712},
        lr=0.1,
    )
    return replace(made, **{name: value for name, value in changes.items() if name not in of_result})


def evaluation(number: int, **changes: Any) -> EvaluationRecord:
    made = EvaluationRecord(
        update=number, epoch=(number - 1) // 6, metrics={"loss": 0.1234, "accuracy": 0.981}, seconds=0.5
    )
    return replace(made, **changes)


def end(run_dir: Path | None, **changes: Any) -> RunEnd:
    made = RunEnd(
        updates=180,
        samples=11_520,
        skipped_updates=0,
        stopped_early=None,
        evaluation=evaluation(180),
        train_seconds=12.3,
        total_seconds=14.2,
        samples_per_second=3214.4,
        data_share=0.031,
        compute_share=0.902,
        sync_share=0.067,
        peak_memory_bytes=432_328_704,
        peak_memory_kind="resident set",
        run_dir=run_dir,
    )
    return replace(made, **changes)
