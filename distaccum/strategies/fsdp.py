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
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from distaccum.config import FSDPConfig
from distaccum.config.enums import PrecisionName
from distaccum.errors import UserError
from distaccum.runtime.compilation import Compilation
from distaccum.runtime.devices import Stopwatch
from distaccum.strategies._fsdp_internals import (
    ObservedReduceScatter,
    drop_unreduced_gradients,
    formats_of_groups,
    gathered_parameters,
    sharded_modules,
)
from distaccum.strategies.base import Strategy, Traffic, local_parts, refuse_unsynced
from distaccum.strategies.blocks import blocks_to_wrap

logger = logging.getLogger(__name__)


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
        for block in sharded_modules(model):
            for formats in formats_of_groups(block):
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
        self._sync: _Sync = model.__dict__.setdefault("_distaccum_sync", _Sync(device))
        self._sync.reshard_in_window &= reshard_in_window
        self.traffic = self._sync.traffic
        if self.world_size > 1:
            for module in sharded_modules(model):
                module.set_custom_reduce_scatter(self._sync.reduce_scatter)
        if not self._sync.reshard_in_window:
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
        if not self._sync.reshard_in_window:
            self._root.set_reshard_after_backward(sync)

    def require_sync(self, calls_before: int, parameters: Sequence[Tensor]) -> None:
        refuse_unsynced(self, calls_before, [entry for entry in parameters if not isinstance(entry, DTensor)])

    def placeholder_loss(self, loss_sum: Tensor) -> Tensor:
        # FSDP's collectives are in the backward of the model's own graph, so it can't be left out. A placeholder is a
        # sample of the window, so it is NaN only where the window's loss is NaN already.
        return loss_sum * 0

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        # Each rank holds a shard of every gradient: squares are added up over the ranks.
        return self.group_norms([gradients])[0]

    def group_norms(self, groups: Sequence[list[Tensor]]) -> Tensor:
        parts = [local_parts(group) for group in groups]
        none = torch.zeros((), device=self.device)
        squares = torch.stack([(get_total_norm(part) if part else none).double().square() for part in parts])
        dist.all_reduce(squares, group=self.process_group)
        return squares.sqrt()

    def gradient_leaves(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        return gathered_parameters(self.model, [parameter for parameter in parameters if parameter.requires_grad])

    def drop_gradients(self) -> None:
        drop_unreduced_gradients(self._root)

    def own_clock(self) -> Callable[[], float] | None:
        blocks: Iterator[Any] = sharded_modules(self.model)
        innermost = [block for block in blocks if len(list(sharded_modules(block))) == 1]
        return _ForwardClock(innermost, Stopwatch(self.device)).take

    def share_buffers(self) -> None:
        for buffer in self.model.buffers():
            dist.broadcast(buffer, group_src=0, group=self.process_group)

    def at_rest(self) -> None:
        _reshard(self.model)


class _ForwardClock:
    """Times forwards between FSDP's hooks: after the parameters have been gathered, before they are freed.

    The backward, in the middle of which parameters are gathered, is not timed, nor is what the root computes by itself.
    Both are assumed to be in proportion.
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
    """Frees gathered parameters, which a forward leaves in the place of their shards."""
    for module in sharded_modules(model):
        module.reshard()


class _Sync:
    """The reduce-scatter of a model's gradients, counted. Kept with the model: several strategies of it share one."""

    def __init__(self, device: torch.device) -> None:
        self.traffic = Traffic(Stopwatch(device).mark)
        self.reduce_scatter = ObservedReduceScatter(self.traffic.count)
        self.reshard_in_window = True


def place_fsdp(
    module: nn.Module,
    config: FSDPConfig,
    device: torch.device,
    precision: PrecisionName,
    compilation: Compilation | None = None,
) -> FSDPStrategy:
    """Shards a module on this rank's device, block by block.

    Raises:
        UserError: there is no process group, no module has a name of `strategy.wrap`, the precision is fp16, or FSDP
            can't shard a parameter.
    """
    if not dist.is_initialized():
        raise UserError(
            "strategy=fsdp needs processes that torchrun starts, and this one was started without it. Run "
            "`torchrun --nproc_per_node=4 -m distaccum.train strategy=fsdp …`, or set strategy=single."
        )
    if precision is PrecisionName.fp16:
        raise UserError(
            "strategy=fsdp does not support precision=fp16: its scaler doesn't know shards. Use precision=bf16."
        )
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
