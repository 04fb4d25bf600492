"""The parts of FSDP2 that torch keeps private or has renamed, and that are used here.

tests/strategies/test_internals.py asserts that all of it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

# torch 2.13 has renamed it, and warns of the old name.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def sharded_modules(model: Any) -> Iterator[FSDPModule]:
    """The modules of a model that `fully_shard` was called with."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def _groups_of(module: FSDPModule) -> list[list[Any]]:
    """FSDP's records of a module's own parameters, for each group that it gathers as one."""
    state: Any = module._get_fsdp_state()
    group = getattr(state, "_fsdp_param_group", None)  # up to torch 2.12
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [group] if group is not None else []
    return [group.fsdp_params for group in groups]


def formats_of_groups(module: FSDPModule) -> list[set[str]]:
    """The formats of the parameters that require a gradient, for each group that a module gathers as one."""
    groups = [[entry.sharded_param for entry in group] for group in _groups_of(module)]
    return [{str(parameter.dtype) for parameter in group if parameter.requires_grad} for group in groups]


def gathered_parameters(model: nn.Module, sharded: Sequence[Tensor]) -> list[Tensor]:
    """The whole parameters, to which a rank's own gradients of a micro-step come. All ranks call it.

    Args:
        sharded: those whose counterparts are wanted.
    """
    wanted = {id(parameter) for parameter in sharded}
    found: list[Tensor] = []
    for module in sharded_modules(model):
        mine = [entry for group in _groups_of(module) for entry in group]
        if any(not hasattr(entry, "_unsharded_param") for entry in mine):
            module.unshard()  # made with the first gathering, and kept
            module.reshard()
        found += [entry._unsharded_param for entry in mine if id(entry.sharded_param) in wanted]
    return found


def drop_unreduced_gradients(model: FSDPModule) -> None:
    """Drops gradients that have not been reduced yet: on the gathered parameters, out of sight of the optimizer."""
    if hasattr(model, "reset_iter_state"):  # since torch 2.13
        model.reset_iter_state()
    for module in sharded_modules(model):
        for entry in (entry for group in _groups_of(module) for entry in group):
            if "unsharded_accumulated_grad" in vars(entry):  # up to torch 2.14; later it is the gradient below
                entry.unsharded_accumulated_grad = None
            if hasattr(entry, "_unsharded_param"):
                entry._unsharded_param.grad = None


class ObservedReduceScatter(ReduceScatter):
    """The reduce-scatter that FSDP makes by itself, which calls `before` with its input first."""

    def __init__(self, before: Callable[[Tensor], None]) -> None:
        self._before = before

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        self._before(input_tensor)
        work: dist.Work | None = _reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
        return work
