"""Devices and precisions: choosing them, moving batches to them, reading clocks and memory on them."""

from __future__ import annotations

import gc
import os
import resource
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distaccum.choices import DeviceChoice, PrecisionName
from distaccum.errors import UserError


def resolve_device(choice: DeviceChoice, local_rank: int = 0) -> torch.device:
    """The device of this rank.

    Raises:
        UserError: CUDA was asked for and there is none, or fewer GPUs than ranks on this host.
    """
    if choice is DeviceChoice.cpu or (choice is DeviceChoice.auto and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        build = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
        raise UserError(f"device=cuda, but {build}. Set device=cpu or device=auto, or mend the CUDA installation.")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"this host has {count} GPU{'' if count == 1 else 's'}, too few for local rank {local_rank}: every rank "
            f"needs one of its own. Start {count} process{'' if count == 1 else 'es'} a host, or set device=cpu."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def to_device(batch: Any, device: torch.device, *, non_blocking: bool = False, float_dtype: torch.dtype | None) -> Any:
    """Moves every tensor of a (nested) batch to a device.

    Args:
        batch: a tensor, or tuples, lists and mappings of tensors; an object with a `to` method of its own is moved by
            that, anything else stays as it is.
        float_dtype: floating-point tensors are cast to it, complex ones to its counterpart; None leaves them.
    """

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            dtype = _own_kind(value, float_dtype) if float_dtype is not None else None
            return value.to(device=device, dtype=dtype, non_blocking=non_blocking)
        if isinstance(value, dict) or (isinstance(value, Mapping) and not hasattr(value, "to")):
            return _rebuilt(value, {key: move(entry) for key, entry in value.items()})
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(move, value))
        if isinstance(value, tuple | list):
            return type(value)(map(move, value))
        return value.to(device) if hasattr(value, "to") else value

    return move(batch)


def cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Casts a module's floating-point parameters and buffers in place, complex ones to the format's counterpart.

    `module.to(dtype)` would drop the imaginary parts.
    """
    module._apply(lambda tensor: tensor.to(_own_kind(tensor, dtype)))  # type: ignore[no-untyped-call]
    return module


def _own_kind(tensor: Tensor, float_dtype: torch.dtype) -> torch.dtype:
    if tensor.is_complex():
        return float_dtype.to_complex()
    return float_dtype if tensor.is_floating_point() else tensor.dtype


def _rebuilt(mapping: Mapping[Any, Any], entries: dict[Any, Any]) -> Any:
    """The entries in a mapping of the same type, if it can be made of a dict."""
    try:
        return type(mapping)(entries)  # type: ignore[call-arg]
    except TypeError:  # a defaultdict, say, which takes its factory first
        return entries


def tensors_of(batch: Any) -> list[Tensor]:
    """All tensors of a (nested) batch."""
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        batch = batch.values()
    elif not isinstance(batch, tuple | list):
        return []
    return [tensor for value in batch for tensor in tensors_of(value)]


class Stopwatch:
    """Reads a device's own clock without making the host wait for the device.

    A mark on CUDA is an event in the current stream; the seconds between two marks may be asked for once the host has
    waited for the later one.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1e3 if self._on_cuda else float(end - start)


_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",  # torch's allocator on the CPU
    "ALLOC_FAILED",  # cuBLAS, cuDNN
    "ALLOCATION_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory has run out, on the host or on a device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def free_cached_memory(device: torch.device) -> None:
    """Gives back what torch's allocator keeps for later, so that it can be had in other sizes."""
    gc.collect()  # what a traceback or a module in a cycle held
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_memory(device: torch.device) -> int:
    """Bytes that this process could still get: of the device's memory, or of the host's and this job's limit of it."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    limits = []
    with suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with suppress(OSError, ValueError):  # cgroup v2, as containers and SLURM set it
        group = Path(
            "/sys/fs/cgroup", Path("/proc/self/cgroup").read_text().splitlines()[-1].rpartition(":")[2].strip("/")
        )
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(limits) if limits else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def peak_memory(device: torch.device) -> tuple[int, str]:
    """Bytes at the highest point so far, and what they are, in words."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "of device memory"
    # ru_maxrss would be that of the launcher too: a process takes it over from the one that started it.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024, "resident set"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "resident set"


@dataclass(frozen=True, slots=True)
class Precision:
    """A floating-point format to compute in, on one device. Made by `resolve_precision`."""

    name: PrecisionName
    device_type: str

    @property
    def parameter_dtype(self) -> torch.dtype:
        return {PrecisionName.fp64: torch.float64, PrecisionName.bf16_params: torch.bfloat16}.get(
            self.name, torch.float32
        )

    @property
    def input_dtype(self) -> torch.dtype | None:
        """What floating-point inputs are cast to; None where they may stay as they are."""
        return None if self.parameter_dtype is torch.float32 else self.parameter_dtype

    def autocast(self) -> AbstractContextManager[Any]:
        """Encloses forwards. Does nothing unless the precision is bf16 or fp16."""
        if self.name is PrecisionName.bf16:
            return torch.autocast(self.device_type, torch.bfloat16)
        if self.name is PrecisionName.fp16:
            return torch.autocast(self.device_type, torch.float16)
        return nullcontext()


def resolve_precision(name: PrecisionName, device: torch.device) -> Precision:
    """Checks by trying that a device can compute in a precision.

    Raises:
        UserError: it cannot.
    """
    precision = Precision(name, device.type)
    if name not in (PrecisionName.bf16, PrecisionName.fp16):
        return precision
    try:
        inputs = torch.ones(2, 3, 4, 4, device=device, requires_grad=True)
        kernels = torch.ones(3, 3, 3, 3, device=device, requires_grad=True)
        with precision.autocast():
            hidden = torch.nn.functional.conv2d(inputs, kernels).flatten(1)
            loss = torch.nn.functional.linear(hidden, hidden).float().sum()
        loss.backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"precision={name.value} can't run on this {device.type}: {reason}. Set precision=bf16 or precision=fp32."
        ) from error
    return precision
