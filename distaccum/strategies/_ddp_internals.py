"""The parts of `DistributedDataParallel` and PowerSGD that torch keeps private or has renamed, and that are used here.

tests/strategies/test_internals.py asserts that all of it is there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd
from torch.nn.parallel import DistributedDataParallel


def hook_of(model: DistributedDataParallel) -> tuple[Any, Any] | None:
    """The model's communication hook and the hook's state; None if it has none."""
    hooks: list[tuple[Any, Any]] = model._comm_hooks
    return hooks[0] if hooks else None


def start_window(model: DistributedDataParallel) -> None:
    """Does what DDP does at the start of a window's first forward, and leaves it out of the forwards to come."""
    model.reducer._rebuild_buckets()  # once in a run: after the first sync
    if model.will_sync_module_buffers():  # type: ignore[no-untyped-call]
        model._sync_buffers()  # type: ignore[no-untyped-call]
    model.require_forward_param_sync = False


def start_sync(model: DistributedDataParallel, loss_sum: Tensor) -> None:
    """Does what DDP does at the end of a forward whose backward is to be synchronised."""
    model.require_forward_param_sync = True
    model.reducer.prepare_for_backward([loss_sum] if model.find_unused_parameters else [])


def require_whole_sync(model: DistributedDataParallel) -> None:
    """Raises DDP's RuntimeError if the last sync has not got all gradients."""
    model.reducer._check_reducer_finalized()


def rebuild_reducer(model: DistributedDataParallel) -> None:
    """Makes a new reducer for the parameters that require a gradient now, with the same communication hooks.

    What DDP does when it is unpickled; no rank waits for another one.
    """
    hooks = list(model._comm_hooks)
    model.reducer._remove_autograd_hooks()
    parameters, are_sparse = model._build_params_for_reducer()  # type: ignore[no-untyped-call]
    names = model._build_debug_param_to_name_mapping(parameters)  # type: ignore[no-untyped-call]
    model._ddp_init_helper(parameters, are_sparse, names, model.static_graph)  # type: ignore[no-untyped-call]
    model._comm_hooks.clear()
    for hook, state in hooks:
        model.register_comm_hook(state, hook)


def own_group(device: torch.device) -> dist.ProcessGroup:
    """A new group of all ranks with the timeout of the first one, and not torch's default."""
    assert dist.group.WORLD is not None
    group: dist.ProcessGroup = dist.new_group(timeout=dist.group.WORLD._get_backend(device).options._timeout)
    return group


def buffer_arguments(broadcast_buffers: bool) -> dict[str, Any]:
    """The argument of `DistributedDataParallel` that says whether rank 0's buffers replace the other ranks'."""
    if broadcast_buffers:
        return {}  # DDP's default
    # torch 2.13 renamed the argument and warns of the old name.
    parameters = inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers": False}


class _CountedDistributed:
    """Replaces `torch.distributed` inside torch's PowerSGD module, to count the collectives that it starts."""

    def __init__(self) -> None:
        self.counts: WeakKeyDictionary[Any, Callable[[Tensor], None]] = WeakKeyDictionary()

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def all_reduce(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if (group := kwargs.get("group")) in self.counts:
            self.counts[group](tensor)
        return dist.all_reduce(tensor, *args, **kwargs)


_counted = _CountedDistributed()


def count_powersgd(group: dist.ProcessGroup, count: Callable[[Tensor], None]) -> None:
    """Calls `count` with the tensor of each all-reduce that torch's PowerSGD starts in a group."""
    _counted.counts[group] = count
    powersgd.dist = _counted  # type: ignore[attr-defined, assignment]


def powersgd_memories(state: powersgd.PowerSGDState) -> dict[str, dict[int, Tensor]]:
    """Returns PowerSGD's memory of earlier updates, by bucket: error feedback and both factors; live dictionaries."""
    return {name: getattr(state, name) for name in ("error_dict", "p_memory_dict", "q_memory_dict")}
