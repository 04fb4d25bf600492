"""DistributedDataParallel: one process per device, each with a whole model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distaccum.config import DDPConfig
from distaccum.config.enums import Compression, PrecisionName
from distaccum.errors import UserError, listed
from distaccum.runtime.devices import Stopwatch
from distaccum.strategies._ddp_internals import (
    buffer_arguments,
    hook_of,
    own_group,
    powersgd_memories,
    rebuild_reducer,
    require_whole_sync,
    start_sync,
    start_window,
)
from distaccum.strategies.base import Strategy, Traffic, refuse_unsynced
from distaccum.strategies.gradient_sync import (
    HookState,
    communication_hook,
    give_threads_time_at_exit,
    load_powersgd_tensors,
    powersgd_hook,
    powersgd_tensors,
)
from distaccum.strategies.placeholders import with_zero_gradients, zero_with_gradients
from distaccum.strategies.scalar_sync import FirstBucketScalars, summed_beside


class DDPStrategy(Strategy):
    """A `DistributedDataParallel` model, made by `place_ddp` or by the user's own loop.

    Several strategies of one model share their state, which is kept with its communication hook.

    Args:
        model: the wrapped model, without a communication hook of its own: one is registered that does what DDP does by
            itself (all-reduce) and counts it.
        config: how gradients are compressed.

    Raises:
        UserError: the model has another hook.
    """

    model: DistributedDataParallel

    def __init__(self, model: DistributedDataParallel, config: DDPConfig | None = None) -> None:
        self.model = model
        self.module = model.module
        self.device = next(model.parameters()).device
        self.process_group = model.process_group
        self.world_size = dist.get_world_size(model.process_group)
        self._has_sync_batchnorm = any(isinstance(part, nn.SyncBatchNorm) for part in model.modules())
        self.equal_micro_steps = self.world_size > 1 and (model.static_graph or self._has_sync_batchnorm)
        self.gradients_stay = model.gradient_as_bucket_view
        self.shares_buffers = self.world_size == 1 or model.broadcast_buffers
        self._state = _hook_state_of(model, config) or self._registered(config or DDPConfig())
        self.traffic, self._scalars = self._state.traffic, self._state.scalars
        self._powersgd = self._state.powersgd_state

    def _registered(self, config: DDPConfig) -> HookState:
        compression, is_on_cpu = config.compression, self.device.type == "cpu"
        if is_on_cpu:
            give_threads_time_at_exit()
        # The mean takes one more pass over the gradients than the sum. A static graph needs it (see no_sync), a sum may
        # overflow in float16, and PowerSGD has nothing else.
        is_mean = self.model.static_graph or compression in (Compression.fp16, Compression.powersgd)
        group, has_powersgd = self.model.process_group, compression is Compression.powersgd
        state = HookState(
            process_group=group,
            divisor=self.world_size if is_mean else 1,
            traffic=Traffic(Stopwatch(self.device).mark),
            scalars=FirstBucketScalars(group) if is_on_cpu and not has_powersgd else None,
            compression=compression,
            graph_is_known=not self.model.static_graph,
            names=self._trained_names(),
        )
        hook = powersgd_hook(state, config) if has_powersgd else communication_hook(compression)
        self.model.register_comm_hook(state, hook)
        return state

    def _trained_names(self) -> list[str]:
        return [name for name, parameter in self.module.named_parameters() if parameter.requires_grad]

    @property
    def sync_divisor(self) -> int:
        return self._state.divisor

    def take_mean(self) -> None:
        """Makes the sync take the mean over the ranks, for a loop that syncs more than once in a window.

        Gradients that are the mean already, the same on every rank, stay what they are in a later mean; a sum would
        count them again.
        """
        self._state.divisor = self.world_size

    def no_sync(self) -> AbstractContextManager[None]:
        if not self._state.graph_is_known:
            self._state.graph_is_known = True
            # DDP learns a static graph in the first backward it synchronises, and fails an internal assertion if an
            # unsynchronised one came before. Syncing this micro-step too changes nothing: the mean of gradients that
            # are equal on all ranks is what they are already.
            return nullcontext()
        return self.model.no_sync()

    def summed(self, numbers: Tensor) -> Callable[[], Tensor]:
        return self._scalars.start(numbers) if self._scalars else summed_beside(numbers, self.process_group)

    def placeholder_loss(self, loss_sum: Tensor) -> Tensor:
        # SyncBatchNorm's backward holds a collective, and a static graph counts gradients and starts its sync from the
        # model's output, so the model's part of the graph can't be left out.
        if self._has_sync_batchnorm or self.model.static_graph:
            return loss_sum * 0
        if self.model.find_unused_parameters:
            return with_zero_gradients(loss_sum)  # DDP waits for no others
        # Of all, as reentrant checkpointing hides parameters from the graph.
        return zero_with_gradients([parameter for parameter in self.module.parameters() if parameter.requires_grad])

    def require_sync(self, calls_before: int, parameters: Sequence[Tensor]) -> None:
        try:
            require_whole_sync(self.model)
        except RuntimeError as error:
            numbers = re.search(r"did not receive grad for rank \d+:((?: \d+)+)", str(error))
            names = (
                [self._state.names[int(number)] for number in numbers[1].split()] if numbers else ["some parameters"]
            )
            how = "Set strategy.find_unused_parameters=true (DistributedDataParallel has it too)"
            how = "Leave static_graph out" if self.model.static_graph else how
            raise UserError(
                f"the loss of the window's last micro-step doesn't reach {listed(names)} on rank {dist.get_rank()}, "
                f"and DDP waits for their gradients. {how}; or freeze what is never used before the model is wrapped."
            ) from error
        if self._state.is_learning:
            self._state.is_learning = False  # a whole sync has been seen
            # Of a reducer made anew: also those that had a gradient before, and are not in it.
            parameters = [*parameters, *(entry for entry in self.module.parameters() if entry.grad is not None)]
        lost = {id(entry): entry for entry in parameters if id(entry) not in self._state.synced}
        refuse_unsynced(self, calls_before, list(lost.values()))

    def gradient_leaves(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        if self._powersgd is not None:
            raise UserError(
                "strategy.compression=powersgd does not support insight.noise_scale: the compressed sum of the "
                "gradients can't be compared with its parts. Leave one of them out."
            )
        return super().gradient_leaves(parameters)

    def drop_gradients(self) -> None:
        if self._scalars is not None:
            self._scalars.drop()
        if self._powersgd is not None:
            # What PowerSGD keeps of the window's gradients, NaN included, would go into all that follow.
            for memory in powersgd_memories(self._powersgd).values():
                memory.clear()

    def own_clock(self) -> Callable[[], float] | None:
        if self._has_sync_batchnorm and self.world_size > 1:
            raise UserError(
                "batch.balance=speed does not support SyncBatchNorm: its ranks wait for each other in every layer, so "
                "that all look equally fast. Set batch.balance=even, or leave strategy.sync_batchnorm out."
            )
        return None  # a static graph wants equal numbers of micro-steps, but nobody waits in them

    def share_buffers(self) -> None:
        if self.model.broadcast_buffers:
            for buffer in self.module.buffers():
                dist.broadcast(buffer, group_src=0, group=self.process_group)

    def rebuild(self) -> None:
        reason = "PowerSGD keeps a state of each of DDP's buckets, which become others" if self._powersgd else None
        reason = "static_graph=true fixes which parameters have gradients" if self.model.static_graph else reason
        if hasattr(self.module.forward, "_torchdynamo_orig_callable") and torch.__version__ < "2.13":
            # Its compiled graphs then give gradients that are not those of the model.
            reason = f"compiled models under DDP need torch 2.13 for it, and this is {torch.__version__}"
        if reason is not None:
            raise UserError(f"parameters can't be frozen or unfrozen on the way here: {reason}. Leave one of them out.")
        for parameter in self.module.parameters():
            parameter.grad = None  # a view of buckets that are going
        rebuild_reducer(self.model)
        self._state.names = self._trained_names()
        self._state.synced.clear()
        self._state.is_learning = True

    def warm_up(self, forward: Callable[[], Tensor]) -> None:
        if self.world_size == 1 or (self.model.find_unused_parameters and not self.model.static_graph):
            return
        # After its first synchronised backward DDP lays its buckets out anew, in the order in which gradients came.
        # The place of a gradient in its bucket decides in which order the ranks' parts are added up, and so its bits.
        # With a static graph it does so after the second one.
        for _ in range(2 if self.model.static_graph else 1):
            (forward() * 0).backward()  # type: ignore[no-untyped-call]
            self.require_sync(-1, ())
        self._state.graph_is_known = True

    @property
    def can_recover(self) -> bool:
        return not self.equal_micro_steps

    def begin_window(self) -> None:
        start_window(self.model)

    def last_gradient(self, parameters: Sequence[Tensor]) -> Tensor | None:
        # The first parameter's gradient is in the bucket that is sent last anyway. Autograd takes what was made first
        # last of all, which is why this is made before the forward. NaN in one that isn't the optimizer's would be seen
        # by nobody.
        held = {id(parameter) for parameter in parameters}
        first = next((p for p in self.module.parameters() if p.requires_grad and id(p) in held), None)
        return zero_with_gradients([first], None) if first is not None else None

    def begin_sync(self, loss_sum: Tensor) -> None:
        start_sync(self.model, loss_sum)

    def complete_sync(self) -> None:
        # DDP sends a bucket when the last of its gradients is complete. Those that are complete say so, and change
        # nothing, but for their values: all of them will be dropped.
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                try:
                    zero_with_gradients([parameter], math.nan).backward()  # type: ignore[no-untyped-call]
                except RuntimeError as error:
                    if "ready only once" not in str(error):
                        raise
        require_whole_sync(self.model)

    def state_tensors(self) -> dict[str, Tensor]:
        return powersgd_tensors(self._powersgd) if self._powersgd is not None else {}

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        if self._powersgd is not None and state:
            load_powersgd_tensors(self._powersgd, state, self.device)


def _hook_state_of(model: DistributedDataParallel, config: DDPConfig | None) -> HookState | None:
    """The state of an earlier strategy's hook; None if there is no hook yet."""
    found = hook_of(model)
    if found is None:
        return None
    hook, state = found
    if isinstance(state, HookState) and (config is None or config.compression is state.compression):
        return state
    raise UserError(
        f"the model has the communication hook {getattr(hook, '__qualname__', hook)} already: it can't be replaced, "
        "and whether a foreign one takes the sum or the mean over the ranks is not known. Have it registered "
        "by DDPStrategy(model, DDPConfig(compression=…)), made once and passed on as strategy=."
    )


def place_ddp(
    module: nn.Module,
    config: DDPConfig,
    device: torch.device,
    precision: PrecisionName = PrecisionName.fp32,
    group: dist.ProcessGroup | None = None,
) -> DDPStrategy:
    """Wraps a module that lies on this rank's device.

    Args:
        group: the ranks whose gradients are added up; nothing else may use it. Default: all.

    Raises:
        UserError: there is no process group, SyncBatchNorm is asked for on a CPU, or gradients are to be of another
            format than the parameters.
    """
    if not dist.is_initialized():
        raise UserError(
            "strategy=ddp needs processes that torchrun starts, and this one was started without it. Run "
            "`torchrun --nproc_per_node=4 -m distaccum.train …`, or set strategy=single."
        )
    if precision is PrecisionName.bf16_params:
        raise UserError(
            "strategy=ddp does not support precision=bf16_params: DDP's buckets are of the parameters' format, so the "
            "gradients couldn't accumulate in float32. Set strategy=fsdp or single, or precision=bf16."
        )
    if config.sync_batchnorm:
        if device.type != "cuda":
            raise UserError(
                "strategy.sync_batchnorm=true runs on CUDA only, not on a CPU. Leave it out, or use GroupNorm."
            )
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
    # PowerSGD's collectives are recognised by their group, so it gets one of its own.
    if group is None and config.compression is Compression.powersgd:
        group = own_group(device)
    model = DistributedDataParallel(
        module,
        device_ids=[device] if device.type == "cuda" else None,
        process_group=group,
        bucket_cap_mb=config.bucket_cap_mb,
        gradient_as_bucket_view=config.gradient_as_bucket_view,
        find_unused_parameters=config.find_unused_parameters,
        static_graph=config.static_graph,
        **buffer_arguments(config.broadcast_buffers),
    )
    return DDPStrategy(model, config)
