"""FSDP2: one process per device, each with a shard of the parameters, the gradients and the optimizer's state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from distaccum.config import FSDPConfig
from distaccum.config.enums import PrecisionName
from distaccum.errors import UserError
from distaccum.runtime.compilation import Compilation
from distaccum.runtime.devices import Stopwatch
from distaccum.strategies.base import Strategy, Traffic, local_parts, refuse_unsynced
from distaccum.strategies.blocks import blocks_to_wrap

logger = logging.getLogger(__name__)

# torch 2.13 has renamed it, and warns of the old name.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class FSDPStrategy(Strategy):
    """A module sharded by `fully_shard`. Forwards hold collectives, so ranks must take equally many of them."""

    def __init__(self, model: nn.Module, device: torch.device, *, reshard_in_window: bool = True) -> None:
        assert isinstance(model, FSDPModule)
        _reshard(model)
        meshes = [p.device_mesh if isinstance(p, DTensor) else None for p in model.parameters()]
        if any(mesh is None or mesh.ndim != 1 or mesh.size() != dist.get_world_size() for mesh in meshes):
            raise UserError(
                "the model is not sharded over all ranks alike: every parameter must be, on one mesh dimension of "
                f"{dist.get_world_size()} ranks (no HSDP, no sub-mesh, no ignored parameters)."
            )
        for block in (module for module in model.modules() if isinstance(module, FSDPModule)):
            for group in _groups_of(block):
                formats = {str(p.sharded_param.dtype) for p in group.fsdp_params if p.sharded_param.requires_grad}
                if len(formats) > 1:
                    raise UserError(
                        f"{type(block).__name__.removeprefix('FSDP')} has parameters of {' and '.join(sorted(formats))}"
                        " in one block, which FSDP gathers in one format. Cast them to one, shard them as blocks of "
                        "their own (strategy.wrap), or set strategy=ddp."
                    )
        self.model = self.module = model
        self.device = device
        self.process_group = dist.group.WORLD
        self.world_size = dist.get_world_size()
        self.equal_micro_steps = self.world_size > 1
        self.shares_buffers = self.world_size == 1
        self._root: FSDPModule = model
        # Kept with the model, so that several strategies of it are one.
        made = _CountedReduceScatter(Stopwatch(device))
        self._counted = counted = model.__dict__.setdefault("_distaccum_reduce_scatter", made)
        counted.reshard_in_window &= reshard_in_window
        self.traffic = counted.traffic
        if self.world_size > 1:
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.set_custom_reduce_scatter(counted)
        if not counted.reshard_in_window:
            model.set_reshard_after_forward(False)

    @property
    def sync_divisor(self) -> int:
        return self.world_size

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """No reduce-scatter; and with `reshard_in_window=false`, parameters stay gathered for the next micro-step."""
        self._set_sync(False)
        try:
            yield
        finally:
            self._set_sync(True)

    def _set_sync(self, sync: bool) -> None:
        # Not set_is_last_backward(sync): FSDP would keep its record of the forwards across micro-steps, and prefetch
        # from it a block that is done with: one all-gather more an update. There is no reduction to wait for anyway.
        self._root.set_requires_gradient_sync(sync)
        if not self._counted.reshard_in_window:
            self._root.set_reshard_after_backward(sync)

    def require_sync(self, calls_before: int, parameters: Sequence[Tensor]) -> None:
        refuse_unsynced(self, calls_before, [entry for entry in parameters if not isinstance(entry, DTensor)])

    def placeholder_loss(self, loss_sum: Tensor) -> Tensor:
        # FSDP's collectives are in the backward of the model's own graph, so it can't be left out. A placeholder is a
        # sample of the window, so it is NaN only where the window's loss is NaN already.
        return loss_sum * 0

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        # Each rank holds a shard of every gradient: squares are added up over the ranks.
        square = get_total_norm(local_parts(gradients)).double().square()
        dist.all_reduce(square, group=self.process_group)
        return square.sqrt()

    def gradient_leaves(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        wanted = {id(parameter) for parameter in parameters if parameter.requires_grad}
        leaves: list[Tensor] = []
        for module in self.model.modules():
            if not isinstance(module, FSDPModule):
                continue
            mine = [entry for group in _groups_of(module) for entry in group.fsdp_params]
            if any(not hasattr(entry, "_unsharded_param") for entry in mine):
                module.unshard()  # made with the first gathering, and kept
                module.reshard()
            leaves += [entry._unsharded_param for entry in mine if id(entry.sharded_param) in wanted]
        return leaves

    def drop_gradients(self) -> None:
        # Gradients that have not been reduced yet are on the gathered parameters, out of sight of the optimizer.
        if hasattr(self._root, "reset_iter_state"):  # since torch 2.13
            self._root.reset_iter_state()
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                for group in _groups_of(module):
                    for parameter in group.fsdp_params:
                        parameter.unsharded_accumulated_grad = None
                        if hasattr(parameter, "_unsharded_param"):
                            parameter._unsharded_param.grad = None

    def own_clock(self) -> Callable[[], float] | None:
        sharded = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        innermost = [m for m in sharded if not any(isinstance(c, FSDPModule) for c in m.modules() if c is not m)]
        return _ForwardClock(innermost, Stopwatch(self.device)).take

    def share_buffers(self) -> None:
        for buffer in self.model.buffers():
            dist.broadcast(buffer, group_src=0, group=self.process_group)

    def at_rest(self) -> None:
        _reshard(self.model)


class _ForwardClock:
    """Times forwards between FSDP's hooks: after the parameters have been gathered, before they are freed.

    Of the backward, in the midst of which parameters are gathered, nothing is timed; nor of what the root computes by
    itself. Both are taken to be in proportion.
    """

    def __init__(self, modules: Sequence[nn.Module], stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch
        self._marks: list[tuple[Any, Any]] = []
        self._started: Any = None
        for module in modules:
            # FSDP's own hook comes first before the forward, and last after it.
            module.register_forward_pre_hook(self._before)
            module.register_forward_hook(self._after, prepend=True)

    def _before(self, module: nn.Module, inputs: Any) -> None:
        self._started = self._stopwatch.mark() if module.training and torch.is_grad_enabled() else None

    def _after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._started is not None:
            self._marks.append((self._started, self._stopwatch.mark()))
            self._started = None

    def take(self) -> float:
        """Seconds since this was called last."""
        marks, self._marks = self._marks, []
        return sum(self._stopwatch.seconds(start, end) for start, end in marks)


def _reshard(model: nn.Module) -> None:
    """A forward leaves gathered parameters behind, whose shards can't be seen."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _groups_of(module: FSDPModule) -> Sequence[Any]:
    state: Any = module._get_fsdp_state()
    group = getattr(state, "_fsdp_param_group", None)
    return state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [group] if group is not None else []


class _CountedReduceScatter(ReduceScatter):
    """The collective that FSDP makes by itself, counted."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.traffic = Traffic()
        self.reshard_in_window = True
        self._stopwatch = stopwatch

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        self.traffic.count(input_tensor)
        self.traffic.last_launch = self._stopwatch.mark()
        work: dist.Work | None = _reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
        return work


def place_fsdp(
    module: nn.Module,
    config: FSDPConfig,
    device: torch.device,
    precision: PrecisionName,
    compilation: Compilation | None = None,
) -> FSDPStrategy:
    """Shards a module that lies on this rank's device, block by block.

    Raises:
        UserError: there are no other processes, no module has a name of `strategy.wrap`, the precision is fp16, or
            parameters are such as FSDP can't shard.
    """
    if not dist.is_initialized():
        raise UserError(
            "strategy=fsdp needs processes that torchrun starts, and this one was started without it. Run "
            "`torchrun --nproc_per_node=4 -m distaccum.train strategy=fsdp …`, or set strategy=single."
        )
    if precision is PrecisionName.fp16:
        raise UserError("precision=fp16 can't be had with strategy=fsdp: its scaler doesn't know shards. Use bf16.")
    for name, parameter in module.named_parameters():
        if parameter.ndim == 0 or parameter.numel() == 0:
            raise UserError(
                f"strategy=fsdp can't shard {name}, a parameter of shape {list(parameter.shape)}. Give it one "
                "dimension and one number at least, or set strategy=ddp strategy.shard_optimizer=true."
            )
        if not parameter.is_contiguous():
            raise UserError(
                f"strategy=fsdp can't shard {name}, whose memory is in another order (channels_last, or transposed). "
                "Make it contiguous (`model.to(memory_format=torch.contiguous_format)`), or set strategy=ddp."
            )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if precision is PrecisionName.bf16_params:
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    elif precision is PrecisionName.bf16:
        # Gradients are reduced, and accumulated over the window, in float32.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    blocks = blocks_to_wrap(module, config.wrap)
    if compilation is not None:
        for block in blocks or [module]:
            compilation.apply(block)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    kinds = sorted({type(block).__name__.removeprefix("FSDP") for block in blocks})
    logger.info("strategy=fsdp: %d blocks sharded by themselves (%s)", len(blocks), ", ".join(kinds) or "none")
    return FSDPStrategy(module, device, reshard_in_window=config.reshard_in_window)
