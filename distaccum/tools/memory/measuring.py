"""Measures the memory of one rank in real windows of the accumulator, on real tensors."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from distaccum.accumulation import Accumulator
from distaccum.config import DPConfig, EmaConfig, StrategyConfig, SwaConfig
from distaccum.runtime.devices import Precision
from distaccum.runtime.memory import Meter, held_bytes, is_out_of_memory, metered
from distaccum.runtime.nested import tensors_of
from distaccum.strategies import Strategy, local_parts, place, shards_optimizer
from distaccum.strategies.dp import DEFAULT_REPLICAS_ON_CPU
from distaccum.strategies.optimizers import own_optimizer, refuse_closure
from distaccum.tasks import TaskOutput, checked_output, weights_of
from distaccum.training.model import checkpoint_blocks, evaluation_mode
from distaccum.training.optim import build_optimizer
from distaccum.training.weight_average import WeightAverage

STEP = "optimizer step"
EVALUATION = "evaluation"
"""The moments outside of micro-steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Everything on which one rank's memory depends, besides model, task and the size of the micro-batch."""

    strategy: StrategyConfig
    world_size: int
    accumulation_steps: int
    optim: Any
    """A section `optim`."""
    activation_checkpointing: bool
    device: torch.device
    precision: Precision
    clip_norm: float | None = 1.0
    clip_value: float | None = None
    wrap: Sequence[str] = ()
    averages: Sequence[EmaConfig | SwaConfig] = ()
    evaluation_batch_of: Callable[[int], Any] | None = None
    """Makes an evaluation's batch, given the number of samples of the micro-batches."""


@dataclass(slots=True)
class Footprint:
    """The memory of one rank under one setting, in bytes.

    Attributes:
        parameters, buffers, optimizer, averages: at rest, between two windows.
        gradients: at the end of a window.
        other: everything else at rest (DDP's buckets, where gradients are no views of them).
        activations: by size of the micro-batch, the tensors that its forward keeps for the backward.
        batches: by size of the micro-batch, the batch itself.
        peaks: by size of the micro-batch and by moment, the largest at once.
    """

    parameters: int = 0
    buffers: int = 0
    gradients: int = 0
    optimizer: int = 0
    averages: int = 0
    other: int = 0
    activations: dict[int, int] = field(default_factory=dict)
    batches: dict[int, int] = field(default_factory=dict)
    peaks: dict[int, dict[str, int]] = field(default_factory=dict)

    @property
    def peak(self) -> dict[int, int]:
        """The largest of all moments, by size of the micro-batch."""
        return {size: max(moments.values()) for size, moments in self.peaks.items()}


def replicas_of(strategy: StrategyConfig, device: torch.device) -> int:
    """Returns the number of replicas that share each micro-batch of a process."""
    if not isinstance(strategy, DPConfig):
        return 1
    if strategy.replicas is not None:
        return strategy.replicas
    return torch.cuda.device_count() if device.type == "cuda" else DEFAULT_REPLICAS_ON_CPU


@contextmanager
def fake_ranks(world_size: int) -> Iterator[None]:
    """Makes this process rank 0 of a process group without the other ranks: its collectives return at once.

    A rank's memory doesn't depend on what the others send.
    """
    assert not dist.is_initialized(), "there are real ranks already"
    # Here and not above: torch keeps it among its own tests' helpers, and it is needed for nothing else.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own helpers, among themselves
        from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def measure(
    master: nn.Module,
    setting: Setting,
    task: Callable[[nn.Module, Any], TaskOutput],
    batch_of: Callable[[int], Any],
    sizes: Sequence[int],
    *,
    limit: float | None = None,
    has_ranks: bool = False,
) -> Footprint:
    """Trains a copy of a model for some windows, one for each size of the micro-batch, as rank 0 of `world_size`.

    Args:
        master: on the CPU, without activation checkpointing. It isn't changed.
        batch_of: makes a micro-batch of a number of samples, on the device. Its memory counts.
        sizes: of micro-batches, the smallest first.
        limit: bytes; sizes that need more, as far as the smaller ones show, are left out, as are those for which memory
            runs out.
        has_ranks: whether all ranks of a process group call this; without them, the other ranks are imitated.

    Raises:
        UserError: the model, the device or the precision doesn't support the strategy.
        Exception: memory runs out at the smallest size (see `distaccum.runtime.memory.is_out_of_memory`).
    """
    # cuBLAS allocates workspaces at its first use, in the threads of forwards and of backwards, and keeps them. That
    # happens before anything is measured: every setting needs them, and only the first one would show them.
    ones = torch.ones(8, 8, device=setting.device, requires_grad=True)
    (nn.functional.linear(ones, ones, ones[0]) @ ones).sum().backward()  # type: ignore[no-untyped-call]
    is_imitated = setting.world_size > 1 and not has_ranks
    with fake_ranks(setting.world_size) if is_imitated else nullcontext(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        warnings.filterwarnings(
            "ignore", message="`torch.jit.* is deprecated", category=DeprecationWarning
        )  # by torch's own ZeRO-1
        with metered(setting.device) as meter:
            windows = _Windows(master, setting, task, meter, is_imitated)
            try:
                footprint = _footprint(windows, batch_of, sizes, limit)
            finally:
                windows.close()
    gc.collect()  # a placed model and its hooks hold each other
    return footprint


def _footprint(
    windows: _Windows, batch_of: Callable[[int], Any], sizes: Sequence[int], limit: float | None
) -> Footprint:
    found = Footprint()
    # The first window creates gradients and the optimizer's state, and the second DDP's final buckets.
    windows.run(batch_of(sizes[0]))
    windows.run(batch_of(sizes[0]))
    windows.weigh(found)
    for size in sizes:
        if limit is not None and len(found.peaks) > 1 and max(found.peak.values()) / max(found.peaks) * size > limit:
            break
        batch = batch_of(size)
        try:
            peaks, activations = windows.run(batch)
            peaks |= windows.evaluate(size)
        except Exception as error:
            if not found.peaks or not is_out_of_memory(error):
                raise
            break
        found.batches[size] = held_bytes(tensors_of(batch))
        found.peaks[size], found.activations[size] = peaks, activations
    return found


class _Windows:
    """A placed copy of the model that makes updates."""

    def __init__(
        self,
        master: nn.Module,
        setting: Setting,
        task: Callable[[nn.Module, Any], TaskOutput],
        meter: Meter,
        is_imitated: bool,
    ) -> None:
        module = copy.deepcopy(master)
        if setting.activation_checkpointing:
            checkpoint_blocks(module, setting.wrap)
        if setting.strategy.name == "dp":
            meter.watch_threads_of(module)
        self._strategy: Strategy = place(module, setting.strategy, setting.device, setting.precision.name)
        shard = shards_optimizer(setting.strategy)
        self._optimizer = build_optimizer(setting.optim, self._strategy.module, setting.device, shard=shard)
        refuse_closure(self._optimizer, "memory is measured in updates")
        self._averages = [WeightAverage(self._strategy, config) for config in setting.averages]
        self._gradient_bytes = 0
        self._accumulator = Accumulator(
            self._strategy.model,
            self._optimizer,
            clip_norm=setting.clip_norm,
            clip_value=setting.clip_value,
            strategy=self._strategy,
            weights=weights_of(task),
        )
        self._task = task
        self._setting = setting
        self._is_imitated = is_imitated
        self._meter = meter
        # A fourth micro-step would be like the third: gradients are there, and it isn't the last.
        self._micro_steps = min(setting.accumulation_steps, 3)
        meter.lap()

    def run(self, batch: Any) -> tuple[dict[str, int], int]:
        """Makes an update; returns the peak of each moment, and the bytes that a forward keeps for the backward."""
        peaks: dict[str, int] = {}
        kept = 0

        def lap(moment: str) -> None:
            peaks[moment] = max(peaks.get(moment, 0), self._meter.lap())

        self._meter.lap()
        with self._accumulator.window([batch] * self._micro_steps) as micro_batches:
            for number, micro_batch in enumerate(micro_batches, 1):
                before = self._meter.now
                with self._setting.precision.autocast():
                    output = checked_output(self._task(self._strategy.model, micro_batch))
                kept = max(kept, self._meter.now - before)
                lap("forward")
                self._accumulator.backward(output.loss_sum, output.weight, output.sums, terms=output.terms)
                del output
                is_last = number == self._micro_steps
                lap("backward with the sync" if is_last and self._strategy.world_size > 1 else "backward")
        if self._is_imitated:
            # Imitated ranks leave in the gradients whatever was in that memory before.
            torch._foreach_zero_(local_parts(self._gradients()))
        self._gradient_bytes = held_bytes(self._gradients())
        self._accumulator.step()
        for average in self._averages:
            average.after_update(average.config.first_update or 1)
        lap(STEP)
        return peaks, kept

    def evaluate(self, size: int) -> dict[str, int]:
        """Returns the peak of an evaluation's forward, if there is an evaluation."""
        if self._setting.evaluation_batch_of is None:
            return {}
        self._meter.lap()
        module = self._strategy.module
        with evaluation_mode(module), torch.no_grad(), self._setting.precision.autocast():
            self._task(module, self._setting.evaluation_batch_of(size))
        self._strategy.at_rest()
        return {EVALUATION: self._meter.lap()}

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._strategy.model.parameters() if p.grad is not None]

    def weigh(self, found: Footprint) -> None:
        """Records the memory at rest."""
        self._strategy.at_rest()
        module = self._strategy.module
        parameters: list[Tensor] = list(module.parameters())
        inner = own_optimizer(self._optimizer)
        buffers = [b for b in module.buffers() if id(b) not in {id(parameter) for parameter in parameters}]
        found.parameters, found.buffers = held_bytes(parameters), held_bytes(buffers)
        # A bucket counts once, however many gradients are views of it.
        found.gradients, found.optimizer = self._gradient_bytes, held_bytes(tree_iter(list(inner.state.values())))
        found.averages = sum(held_bytes(average.tensors().values()) for average in self._averages)
        # Gradients outside of buckets are freed between windows.
        known = found.parameters + found.buffers + held_bytes(self._gradients()) + found.optimizer + found.averages
        found.other = max(0, self._meter.now - known)

    def close(self) -> None:
        self._accumulator.clear_gradients()
        del self._accumulator, self._averages, self._optimizer, self._strategy
