"""What a record of an update has."""

from __future__ import annotations

from dataclasses import fields

import records

from distaccum.accumulation import UpdateResult
from distaccum.observers.base import RECORDED

ATTRIBUTES = {
    *("update", "epoch", "samples", "window_samples", "loss", "grad_norm", "lr", "micro_steps", "weight"),
    *("update_seconds", "samples_per_second", "sync_calls", "sync_bytes", "metrics", "data_seconds", "sync_seconds"),
    *("noise_scale", "noise_scale_error", "coherence", "skipped", "compile_seconds", "peak_memory_bytes", "terms"),
    *("evaluations", "layers", "data_wait"),
}
"""What observers of users may read."""


def test_a_record_has_what_observers_read() -> None:
    record = records.update(7, noise_scale=5.0)
    assert set(RECORDED) == ATTRIBUTES
    shared = {entry.name for entry in fields(UpdateResult)} & ATTRIBUTES
    assert {name: getattr(record, name) for name in shared} == {name: getattr(record.result, name) for name in shared}
    assert (record.update_seconds, record.samples_per_second, record.compute_seconds) == (0.02, 3200.0, 0.017)
    assert record.known().keys() == ATTRIBUTES - {
        "evaluations",
        "data_wait",
        "noise_scale_error",
        "coherence",
        "peak_memory_bytes",
        "layers",
    }
