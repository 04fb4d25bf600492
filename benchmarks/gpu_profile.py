"""Looks at what host and device do in an update: how often the host waits, and what runs beside copies of batches."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Span = tuple[float, float]
"""Start and end."""
BATCH_BYTES = 4096
"""Copies of fewer bytes are of single numbers, not of a micro-batch."""


class _Waits(TorchDispatchMode):
    """Counts `.item()`, which would make the host wait for a device. (A `.tolist()` is nothing to see on a CPU.)"""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@contextmanager
def host_waits(device: torch.device) -> Iterator[Callable[[], int]]:
    """Counts how often the host waits for the device."""
    if device.type != "cuda":
        with _Waits() as mode:
            yield lambda: mode.count
        return
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: sum("synchronizing CUDA operation" in str(entry.message) for entry in seen)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def copies_overlapped(run: Callable[[], object], device: torch.device) -> float | str:
    """Profiles a run; returns the share of the time of its copies of batches during which the device computes too.

    "-" where nothing is copied to a device.
    """
    if device.type != "cuda":
        run()
        return "-"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        run()
        torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return share_beside(*copies_and_kernels(events))


def copies_and_kernels(events: Iterable[dict[str, Any]]) -> tuple[list[Span], list[Span]]:
    """Returns when batches were copied to the device, and when it computed, of a profile's trace."""
    copies, kernels = [], []
    for event in events:
        span = event.get("ts", 0.0), event.get("ts", 0.0) + event.get("dur", 0.0)
        if event.get("cat") == "kernel":
            kernels.append(span)
        is_copy = event.get("cat") == "gpu_memcpy" and "HtoD" in event.get("name", "")
        if is_copy and event.get("args", {}).get("bytes", BATCH_BYTES) >= BATCH_BYTES:
            copies.append(span)
    return copies, kernels


def share_beside(copies: Iterable[Span], kernels: Iterable[Span]) -> float:
    """Returns the share of the copies' time that lies within kernels; NaN if there is no copy."""
    merged: list[Span] = []
    for start, end in sorted(kernels):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    whole = beside = 0.0
    for start, end in copies:
        whole += end - start
        beside += sum(max(0.0, min(end, last) - max(start, first)) for first, last in merged)
    return beside / whole if whole else float("nan")
