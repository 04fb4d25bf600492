"""DDP communication hooks: the gradient sync itself, counted, and optionally compressed.

DDP checks the annotations of a hook as objects, so this module must not postpone their evaluation.
"""

import atexit
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd
from torch.distributed.distributed_c10d import AllreduceCoalescedOptions
from torch.futures import Future

from distaccum.config import DDPConfig
from distaccum.config.enums import Compression
from distaccum.strategies._ddp_internals import count_powersgd, powersgd_memories
from distaccum.strategies.base import Traffic
from distaccum.strategies.scalar_sync import FirstBucketScalars

Hook = Callable[[Any, GradBucket], Future[torch.Tensor]]


@dataclass(slots=True)
class HookState:
    """State of a hook. It is kept with the hook's model, so that all strategies of the model share it."""

    process_group: dist.ProcessGroup
    divisor: int
    traffic: Traffic
    scalars: FirstBucketScalars | None
    compression: Compression
    powersgd_state: powersgd.PowerSGDState | None = None
    graph_is_known: bool = True
    synced: set[int] = field(default_factory=set)
    """Ids of the parameters in DDP's buckets, which DDP shows to its hook alone."""
    is_learning: bool = True
    names: list[str] = field(default_factory=list)
    """Names of DDP's parameters, by its numbers."""

    def learn(self, bucket: GradBucket) -> None:
        if self.is_learning:
            self.synced.update(map(id, bucket.parameters()))


def communication_hook(compression: Compression) -> Hook:
    """A hook that sums over the ranks, divided by `divisor`, in the gradients' own format or a smaller one.

    float16 is in range, as the accumulator has made gradients of the order of a mean. (torch's own hook for bfloat16
    refuses gloo.) PowerSGD has a hook of its own, `powersgd_hook`.
    """
    dtype = {Compression.none: None, Compression.fp16: torch.float16, Compression.bf16: torch.bfloat16}[compression]

    def all_reduce_hook(state: HookState, bucket: GradBucket) -> Future[torch.Tensor]:
        state.learn(bucket)
        buffer = bucket.buffer()
        sent = buffer if dtype is None else buffer.to(dtype)
        if state.divisor != 1:
            sent.div_(state.divisor)
        state.traffic.count(sent)
        numbers = state.scalars.encoded(sent.dtype) if state.scalars is not None else None
        if numbers is None:
            work: Any = dist.all_reduce(sent, group=state.process_group, async_op=True)
        else:
            work = state.process_group.allreduce_coalesced([sent, numbers], AllreduceCoalescedOptions())
        reduced: Future[Any] = work.get_future()
        # torch's fake process group, whose other ranks don't exist, gives no value.
        if dtype is None:
            return reduced.then(lambda future: (future.value() or (sent,))[0])
        return reduced.then(lambda future: buffer.copy_((future.value() or (sent,))[0]))

    # The name in error messages.
    all_reduce_hook.__qualname__ = "all_reduce_hook" if dtype is None else f"all_reduce_{compression.value}_hook"
    return all_reduce_hook


@functools.cache
def give_threads_time_at_exit() -> None:
    """Makes the interpreter wait a moment before it ends.

    A thread of gloo's frees the callback of the last all-reduce, a Python object, after the update is done. If that
    happens while the interpreter ends, the process is aborted ("terminate called without an active exception"),
    which was seen now and then on a busy machine.
    """
    atexit.register(time.sleep, 0.1)


def powersgd_hook(state: HookState, config: DDPConfig) -> Hook:
    """The hook of PowerSGD (Vogels, Karimireddy and Jaggi 2019), torch's own implementation, counted.

    The process group in `state` must be one that nothing but this model's gradients uses.
    """
    count_powersgd(state.process_group, state.traffic.count)
    state.powersgd_state = remembered = powersgd.PowerSGDState(
        process_group=state.process_group,
        matrix_approximation_rank=config.powersgd_rank,
        start_powerSGD_iter=config.powersgd_start_update,
    )

    last: list[Future[torch.Tensor]] = []

    def counted_powersgd_hook(state: HookState, bucket: GradBucket) -> Future[torch.Tensor]:
        state.learn(bucket)
        if last and bucket.buffer().device.type == "cpu":
            # torch starts a bucket's second and third all-reduce in gloo's threads, when the one before has ended, and
            # waits for them there. Two buckets at a time would do so in another order on each rank, and occupy all the
            # threads that they wait for.
            last.pop().wait()
        if remembered.iter < remembered.start_powerSGD_iter:
            # The uncompressed all-reduce of the first updates is started elsewhere in torch.
            state.traffic.count(bucket.buffer())
        last[:] = [powersgd.powerSGD_hook(remembered, bucket)]
        return last[0]

    return counted_powersgd_hook


def powersgd_tensors(state: powersgd.PowerSGDState) -> dict[str, torch.Tensor]:
    """The state of PowerSGD as tensors: error feedback, factors, number of updates and random generator."""
    _, keys, position, _, _ = state.rng.get_state(legacy=True)
    tensors = {
        "iter": torch.tensor(state.iter, dtype=torch.int64),
        "rng": torch.tensor([*map(int, keys), int(position)], dtype=torch.int64),
    }
    for name, memory in powersgd_memories(state).items():
        tensors |= {f"{name}.{bucket}": tensor for bucket, tensor in memory.items()}
    return tensors


def load_powersgd_tensors(
    state: powersgd.PowerSGDState, tensors: Mapping[str, torch.Tensor], device: torch.device
) -> None:
    """Restores what `powersgd_tensors` returned."""
    *keys, position = tensors["rng"].tolist()
    state.rng.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, 0, 0.0))
    state.iter = int(tensors["iter"])
    memories = powersgd_memories(state)
    for memory in memories.values():
        memory.clear()
    for path, tensor in tensors.items():
        name, _, bucket = path.partition(".")
        if bucket:
            memories[name][int(bucket)] = tensor.to(device)
