"""Measures the memory that tensors hold, and the peak: read from CUDA's allocator, or counted on a CPU.

On a CPU every storage that an operator makes is counted from when it is made until it is freed, whoever holds it:
parameters, gradients, what autograd keeps for the backward, temporaries of Python code, DDP's buckets. What a kernel
takes for itself and gives back before it returns isn't seen.
"""

from __future__ import annotations

import gc
import os
import resource
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from distaccum.runtime.nested import leaves

_THERE_BEFORE = -1
"""Replaces the size of a storage that was made before counting began."""


@contextmanager
def metered(device: torch.device) -> Iterator[Meter]:
    """Measures what tensors hold on a device while the context is open."""
    if device.type == "cuda":
        yield _AllocatorMeter(device)
        return
    live = LiveStorages()
    with _Watch(live), live.watching_resizes():
        yield live


class _AllocatorMeter:
    """Reads from CUDA's allocator what it has given since the start."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.synchronize(device)
        self._before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)

    @property
    def now(self) -> int:
        return torch.cuda.memory_allocated(self._device) - self._before

    def lap(self) -> int:
        torch.cuda.synchronize(self._device)
        peak = torch.cuda.max_memory_allocated(self._device) - self._before
        torch.cuda.reset_peak_memory_stats(self._device)
        return peak

    def watch_threads_of(self, module: nn.Module) -> None:
        pass  # the allocator sees all threads


class LiveStorages:
    """The storages that are alive, counted by a `_Watch` in each thread.

    Attributes:
        now: bytes held now, of what has been made since the start.
    """

    def __init__(self) -> None:
        self.now = 0
        self._peak = 0
        self._sizes: dict[int, int] = {}
        self._lock = threading.RLock()  # a storage may be freed by the very code that holds it

    def lap(self) -> int:
        """The most that was held at once since the start or the last lap."""
        with self._lock:
            peak, self._peak = self._peak, self.now
        return peak

    def watch_threads_of(self, module: nn.Module) -> None:
        """Counts what forwards of the module make in other threads too."""
        watches = threading.local()

        def enter(*_: Any) -> None:
            watches.open = [*getattr(watches, "open", []), _Watch(self)]
            watches.open[-1].__enter__()

        def leave(*_: Any) -> None:
            watches.open.pop().__exit__(None, None, None)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)

    def see(self, tensors: Iterable[Any], *, made: bool) -> None:
        """Counts storages that are new: those of an operator's results, but not those it was given."""
        for value in tensors:
            for storage in storages_of(value):
                if storage.device.type == "cpu":  # that of a fake tensor, which only says that it is there, is meta
                    self._see(storage, made=made)

    @contextmanager
    def watching_resizes(self) -> Iterator[None]:
        """Counts resizes too: FSDP frees gathered parameters, and allocates them again, without any operator."""
        original = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            self._resized(storage)
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]

    def _see(self, storage: torch.UntypedStorage, *, made: bool) -> None:
        key = storage._cdata
        with self._lock:
            if key in self._sizes:
                self._resized(storage)  # by an operator
                return
            self._sizes[key] = storage.nbytes() if made else _THERE_BEFORE
            self._add(storage.nbytes() if made else 0)
        weakref.finalize(storage, self._freed, key).atexit = False

    def _resized(self, storage: torch.UntypedStorage) -> None:
        with self._lock:
            known = self._sizes.get(storage._cdata, _THERE_BEFORE)
            if known != _THERE_BEFORE and storage.nbytes() != known:
                self._sizes[storage._cdata] = storage.nbytes()
                self._add(storage.nbytes() - known)

    def _add(self, size: int) -> None:
        self.now += size
        self._peak = max(self._peak, self.now)

    def _freed(self, key: int) -> None:
        with self._lock:
            self.now -= max(0, self._sizes.pop(key, 0))


Meter = _AllocatorMeter | LiveStorages
"""Bytes that tensors hold on a device, from when the meter was started."""


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows the results of each operator that this thread runs to `LiveStorages`."""

    def __init__(self, live: LiveStorages) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live = live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, Tensor) and kind is not nn.Parameter and _is_wrapper(kind) for kind in types):
            return NotImplemented  # a DTensor, say, which then calls operators on what is in it
        self._live.see(leaves((args, kwargs or {})), made=False)
        result = func(*args, **(kwargs or {}))
        self._live.see(leaves((result, args)), made=True)
        return result


def _is_wrapper(kind: type) -> bool:
    return hasattr(kind, "__tensor_flatten__") and hasattr(kind, "__tensor_unflatten__")


def storages_of(value: Any) -> Iterator[torch.UntypedStorage]:
    """Storages of a tensor, or of those that it is made of (shards, quantised values and scales, sparse indices)."""
    parts: Any = value
    if not isinstance(value, Tensor):
        return
    if _is_wrapper(type(value)):
        for name in parts.__tensor_flatten__()[0]:
            yield from storages_of(getattr(parts, name))
    elif value.layout is torch.sparse_coo:
        yield from (part.untyped_storage() for part in (value._indices(), value._values()))
    else:
        # A parameter without a shape has none, and other sparse layouts show none.
        with suppress(NotImplementedError, RuntimeError, ValueError):
            yield value.untyped_storage()


def held_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of the storages of some tensors, each storage once; subclasses are looked into."""
    storages = {}
    for value in tensors:
        for storage in storages_of(value):
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


class KeptForBackward:
    """Counts what autograd keeps of a forward for its backward: distinct storages, without those that are named.

    Costs a look at each tensor that is kept, so it is for single micro-steps, not for all of them.

    Args:
        apart: tensors that are there anyway: parameters and buffers.
    """

    def __init__(self, apart: Iterable[Tensor]) -> None:
        self._apart = {storage._cdata for value in apart for storage in storages_of(value)}
        self._kept: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> KeptForBackward:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)

    def _pack(self, value: Tensor) -> Tensor:
        for storage in storages_of(value):
            if storage._cdata not in self._apart:
                self._kept[storage._cdata] = storage.nbytes()
        return value

    @property
    def bytes(self) -> int:
        return sum(self._kept.values())


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
    """Frees what torch's allocator keeps, so that it can be allocated in other sizes."""
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
