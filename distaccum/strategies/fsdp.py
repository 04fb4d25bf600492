"""FSDP2: one process per device, each with a shard of the parameters, the gradients and the optimizer's state.

The gradients of a window are added up on each rank as a whole and reduce-scattered once (`accumulate=whole`), or
reduce-scattered in each micro-step and added up in shards. Where ranks hold replicas of shards (several nodes, each
with the whole model), these are all-reduced between the replicas once, after the window's last backward: FSDP's own
all-reduce (`set_requires_all_reduce`) keeps one sum per block, which is lost for what the last micro-step skips.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from distaccum.config import FSDPConfig
from distaccum.config.enums import Accumulate, Offload, PrecisionName
from distaccum.config.launcher import launch
from distaccum.errors import UserError, require
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
from distaccum.strategies.replicas import Layout, all_reduce_parts, layout_of, mesh_of_shards

logger = logging.getLogger(__name__)


class FSDPStrategy(Strategy):
    """A module sharded by `fully_shard`. Forwards hold collectives, so ranks must take equally many of them.

    Args:
        model: sharded over all ranks; or over a part of them, with replicas on the others: on a mesh of two dimensions,
            replicas first, or on the one-dimensional mesh of the rank's own part.
        device: where it computes.
        accumulate: how gradients are added up over micro-steps; `sharded` and `node` are the same here.
        reshard_in_window: free gathered parameters after each forward and backward.
        layout: the ranks that share parameters and that hold the same; by default the ranks ask each other.

    Raises:
        UserError: the parameters are not all sharded alike, or can't be accumulated so.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        *,
        accumulate: Accumulate | str = Accumulate.whole,
        reshard_in_window: bool = True,
        layout: Layout | None = None,
    ) -> None:
        assert isinstance(model, FSDPModule)
        _reshard(model)
        _check_groups(model)
        self.model = self.module = model
        self.device = device
        self.process_group = dist.group.WORLD
        self.world_size = dist.get_world_size()
        self.equal_micro_steps = self.world_size > 1
        self.shares_buffers = self.world_size == 1
        self._root: FSDPModule = model
        if "_distaccum_sync" not in model.__dict__:
            model.__dict__["_distaccum_sync"] = _Sync(model, device, layout)
        self._sync: _Sync = model.__dict__["_distaccum_sync"]
        self._sync.reshard_in_window &= reshard_in_window
        if (accumulate := Accumulate(accumulate)) is not Accumulate.whole:
            self._sync.accumulate_in_shards(model, accumulate)
        self.traffic = self._sync.traffic
        self.in_shards = self._sync.in_shards
        if self.in_shards and self.world_size > 1:
            has_replicas = self._sync.layout.replicas is not None
            self.syncs = "a sync in each micro-step" + (", between replicas 1 per update" if has_replicas else "")
        if not self._sync.reshard_in_window:
            model.set_reshard_after_forward(False)

    @property
    def sync_divisor(self) -> int:
        layout = self._sync.layout
        return self.world_size if self._sync.reduces_replicas else layout.shard_group.size()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """No reduce-scatter, unless gradients are added up in shards.

        With `reshard_in_window=false`, parameters stay gathered for the next micro-step.
        """
        self._set_sync(False)
        try:
            yield
        finally:
            self._set_sync(True)

    def _set_sync(self, sync: bool) -> None:
        # Not set_is_last_backward(sync): FSDP would keep its record of the forwards across micro-steps, and prefetch
        # from it a block that is done with: one all-gather more an update. There is no reduction to wait for anyway.
        if not self._sync.in_shards:
            self._root.set_requires_gradient_sync(sync)
        if not self._sync.reshard_in_window:
            self._root.set_reshard_after_backward(sync)

    def finish_sync(self) -> None:
        """Adds up the gradients between replicas, if FSDP has not done so. The host waits for the device.

        Replicas may have used other blocks: what one of them has no gradient of is zero there.
        """
        replicas = self._sync.layout.replicas
        if replicas is None or self._sync.reduces_replicas:
            return
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        used = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8).to(self.device)
        dist.all_reduce(used, dist.ReduceOp.MAX, group=replicas)
        gradients = []
        for parameter, is_used in zip(parameters, used.tolist(), strict=True):
            if is_used:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                gradients.append(parameter.grad)
        all_reduce_parts(local_parts(gradients), replicas, self.device, partial(self.traffic.count, axis="replicate"))

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
        norms = [get_total_norm(part) if part else none for part in parts]
        squares = torch.stack([norm.to(self.device, torch.float64).square() for norm in norms])
        return self.sum_over_shards(squares).sqrt()

    def sum_over_shards(self, numbers: Tensor) -> Tensor:
        dist.all_reduce(numbers, group=self._sync.layout.shard_group)
        return numbers

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
    """The collectives with a model's gradients, counted. Kept with the model: several strategies of it share one.

    Attributes:
        layout: which ranks they take place between.
        reduces_replicas: True if FSDP itself adds up gradients between replicas, in each backward that synchronises.
        in_shards: True if gradients are reduce-scattered in each micro-step.
    """

    def __init__(self, model: nn.Module, device: torch.device, layout: Layout | None) -> None:
        self.traffic = Traffic(Stopwatch(device).mark)
        self.reshard_in_window = True
        self.in_shards = False
        self.layout, self.reduces_replicas = (layout, False) if layout is not None else _layout(model)
        if dist.get_world_size() == 1:
            return
        axis = "shard" if self.layout.replicas is not None else None
        reduce_scatter = ObservedReduceScatter(partial(self.traffic.count, axis=axis))
        for module in sharded_modules(model):
            module.set_custom_reduce_scatter(reduce_scatter)
            if self.reduces_replicas:  # called with what FSDP has all-reduced
                module.set_all_reduce_hook(partial(self.traffic.count, axis="replicate"))
        if self.layout.replicas is not None:
            for part in local_parts([entry.detach() for entry in model.parameters() if not entry.is_meta]):
                same = part.to(device)
                dist.broadcast(same, group=self.layout.replicas, group_src=0)
                part.copy_(same)

    def accumulate_in_shards(self, model: nn.Module, accumulate: Accumulate) -> None:
        """Has gradients reduce-scattered in each micro-step.

        Raises:
            UserError: they would be added up in a format of few digits, or all-reduced in each micro-step.
        """
        for name, parameter in model.named_parameters():
            # FSDP adds up shards in the parameter's own format.
            if parameter.is_floating_point() and torch.finfo(parameter.dtype).eps > torch.finfo(torch.float32).eps:
                raise UserError(
                    f"strategy.accumulate={accumulate} would add up the gradients of {name} in its own format "
                    f"{str(parameter.dtype).removeprefix('torch.')}, whose digits don't suffice. Keep parameters in "
                    "float32 (precision=bf16 computes in bfloat16 all the same), or set strategy.accumulate=whole."
                )
        if self.reduces_replicas:
            raise UserError(
                f"accumulate={accumulate} does not support a model on a mesh of two dimensions, whose replicas FSDP "
                'all-reduces in each micro-step. Shard it over one of them, fully_shard(block, mesh=mesh["shard"]): '
                "its replicas are then all-reduced once per window."
            )
        self.in_shards = True


def device_of(model: nn.Module) -> torch.device:
    """Returns where a sharded model computes, which with offloaded parameters is not where these are."""
    meshes = [parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)]
    kind = meshes[0].device_type if meshes else "cpu"
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())


def _check_groups(model: nn.Module) -> None:
    for block in sharded_modules(model):
        for formats in formats_of_groups(block):
            if len(formats) > 1:
                raise UserError(
                    f"{type(block).__name__.removeprefix('FSDP')} has parameters of {' and '.join(sorted(formats))}"
                    " in one block, which FSDP gathers in one format. Cast them to one, shard them as blocks of "
                    "their own (strategy.wrap), or set strategy=ddp."
                )


def _layout(model: nn.Module) -> tuple[Layout, bool]:
    """Returns the layout of a sharded model, and whether FSDP itself adds up gradients between its replicas."""
    meshes = {parameter.device_mesh if isinstance(parameter, DTensor) else None for parameter in model.parameters()}
    mesh = next(iter(meshes)) if len(meshes) == 1 else None
    layout = layout_of(mesh) if mesh is not None else None
    if mesh is None or layout is None:
        raise UserError(
            f"the model is not sharded over all {dist.get_world_size()} ranks alike: every parameter must be, on one "
            "mesh (no ignored parameters) of one dimension, or of two, replicas and shards; a mesh of a part of the "
            "ranks must have a counterpart of the same size on the others."
        )
    return layout, mesh.ndim == 2


def _mesh(config: FSDPConfig, device: torch.device) -> tuple[DeviceMesh, Layout]:
    """Returns the mesh that parameters are sharded on, as `strategy.shard_size` and `strategy.accumulate` say."""
    world_size = dist.get_world_size()
    sizes: list[int] = [0] * world_size
    dist.all_gather_object(sizes, launch().local_world_size)
    shard_size = config.shard_size
    if shard_size is None:
        shard_size = sizes[0] if config.accumulate is Accumulate.node else world_size
        require(
            shard_size == world_size or len(set(sizes)) == 1,
            f"strategy.accumulate=node needs nodes with equally many ranks, and they have {sorted(set(sizes))}. Set "
            "strategy.shard_size, or strategy.accumulate=sharded.",
        )
    require(
        world_size % shard_size == 0,
        f"strategy.shard_size={shard_size} does not divide the {world_size} ranks. Set one that does.",
    )
    if shard_size < world_size:
        logger.info(
            "strategy=fsdp: parameters are sharded over %d ranks, in %d replicas", shard_size, world_size // shard_size
        )
    return mesh_of_shards(device, shard_size)


_POLICIES = {
    # Gradients are reduced, and accumulated over the window, in float32.
    PrecisionName.bf16: MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    PrecisionName.fp16: MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float32),
    PrecisionName.bf16_params: MixedPrecisionPolicy(reduce_dtype=torch.float32),
}


def place_fsdp(
    module: nn.Module,
    config: FSDPConfig,
    device: torch.device,
    precision: PrecisionName,
    compilation: Compilation | None = None,
) -> FSDPStrategy:
    """Shards a module on this rank's device, block by block.

    Raises:
        UserError: there is no process group, no module has a name of `strategy.wrap`, the ranks can't be split as
            configured, or FSDP can't shard a parameter.
    """
    _require_shardable(module, config, device, precision)
    mesh, layout = _mesh(config, device)
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": _POLICIES.get(precision, MixedPrecisionPolicy()),
        "offload_policy": OffloadPolicy() if config.offload is Offload.none else CPUOffloadPolicy(),
    }
    blocks = blocks_to_wrap(module, config.wrap)
    if compilation is not None:
        for block in blocks or [module]:
            compilation.apply(block)
    for block in blocks:
        fully_shard(block, **options)
    fully_shard(module, **options)
    kinds = sorted({type(block).__name__.removeprefix("FSDP") for block in blocks})
    logger.info("strategy=fsdp: %d blocks sharded by themselves (%s)", len(blocks), ", ".join(kinds) or "none")
    reshard = config.reshard_in_window
    return FSDPStrategy(module, device, accumulate=config.accumulate, reshard_in_window=reshard, layout=layout)


def _require_shardable(module: nn.Module, config: FSDPConfig, device: torch.device, precision: PrecisionName) -> None:
    if not dist.is_initialized():
        raise UserError(
            "strategy=fsdp needs processes that torchrun starts, and this one was started without it. Run "
            "`torchrun --nproc_per_node=4 -m distaccum.train strategy=fsdp …`, or set strategy=single."
        )
    if config.offload is Offload.cpu:
        require(
            device.type != "cpu",
            "strategy.offload=cpu keeps parameters in the memory of the host, where they are already with device=cpu. "
            "Leave it out.",
        )
        require(
            precision is not PrecisionName.fp16,
            "strategy.offload=cpu does not support precision=fp16: its gradient scaler looks for overflows with "
            "collectives of the GPUs. Use precision=bf16.",
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
