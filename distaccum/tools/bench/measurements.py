"""Measures one placement, in the process of one of its ranks."""

from __future__ import annotations

import dataclasses
import itertools
import random
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from distaccum.accumulation import Accumulator
from distaccum.accumulation.gradient_caching import accumulate_coupled
from distaccum.accumulation.result import UpdateResult
from distaccum.config import DDPConfig, FSDPConfig, PrecisionConfig, TrainConfig
from distaccum.config.enums import OnNonfinite, PrecisionName
from distaccum.loaders import Window
from distaccum.runtime.devices import Stopwatch
from distaccum.runtime.memory import peak_memory
from distaccum.runtime.randomness import derived_seed, seed_everything
from distaccum.strategies import DDPStrategy, Strategy, place, shards_optimizer
from distaccum.strategies.ddp import place_ddp
from distaccum.strategies.optimizers import takes_closure
from distaccum.tasks import CoupledTask, TaskOutput, checked_output, weights_of
from distaccum.tools.bench.network import time_all_reduces
from distaccum.training.build import Parts, build_scaler, compilation_of
from distaccum.training.optim import Schedule, build_optimizer
from distaccum.training.progress import total_updates
from distaccum.training.schedules import schedule_factor


class SyncEveryMicroStep:
    """A strategy whose `no_sync` syncs, as in a loop that does not use `no_sync`.

    Everything else is the strategy's own. The waits of the micro-steps before the last one, which the accumulator does
    not measure, are kept here.
    """

    def __init__(self, strategy: DDPStrategy) -> None:
        strategy.take_mean()
        self._strategy = strategy
        self._stopwatch = Stopwatch(strategy.device)
        self._waits: list[tuple[Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._strategy, name)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        yield
        self._waits.append((self._strategy.traffic.last_launch, self._stopwatch.mark()))

    def take_waited_seconds(self) -> float:
        """Returns the seconds waited since the last call. Call it after the host has waited for the device."""
        waits, self._waits = self._waits, []
        return sum(self._stopwatch.seconds(start, end) for start, end in waits if start is not None)


class Training:
    """Makes the updates of a configured training one at a time: what `distaccum.train` does, without its observers.

    Args:
        sync_every_step: sync in every micro-step, as a loop does that does not use `no_sync`.
        alone: do this rank's part with everything but the network: its gradients are not summed with other ranks'.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        *,
        rank: int,
        world_size: int,
        sync_every_step: bool = False,
        alone: bool = False,
    ) -> None:
        # Where ranks sync in each micro-step, they must take equally many.
        parts = Parts(
            config,
            device,
            rank=rank,
            world_size=world_size,
            equal_micro_steps=sync_every_step,
            may_defer=isinstance(config.strategy, FSDPConfig),
        )
        self.loader = parts.loader
        self.lengths = getattr(parts.train_data, "lengths", None)
        self.task = parts.task
        self.precision = parts.precision
        self.total_updates = total_updates(config.train, parts.loader.sizes)
        factor = schedule_factor(config.schedule, self.total_updates)
        compilation = compilation_of(config, device)
        if alone and isinstance(config.strategy, DDPConfig) and world_size > 1:
            own, _ = dist.new_subgroups(group_size=1)  # type: ignore[no-untyped-call]
            config = dataclasses.replace(config, strategy=dataclasses.replace(config.strategy, shard_optimizer=False))
            assert isinstance(config.strategy, DDPConfig)
            module = parts.module.to(device)
            if compilation is not None:
                compilation.apply(module)
            placed: Strategy = place_ddp(module, config.strategy, device, config.precision.name, own)
        else:
            placed = place(parts.module, config.strategy, device, config.precision.name, compilation)
            parts.initialise(placed, config.strategy)
        self.syncing: SyncEveryMicroStep | None = None
        if sync_every_step:
            assert isinstance(placed, DDPStrategy)
            self.syncing = SyncEveryMicroStep(placed)
        self.strategy = placed if self.syncing is None else cast(Strategy, self.syncing)
        optimizer = build_optimizer(config.optim, self.strategy.module, device, shard=shards_optimizer(config.strategy))
        self.schedule = Schedule(optimizer, factor)
        # As in a training: until here all ranks drew the same numbers; dropout must differ.
        seed_everything(derived_seed(config.seed, "rank", rank))
        self.accumulator = Accumulator(
            self.strategy.model,
            optimizer,
            clip_norm=config.train.clip_norm,
            clip_value=config.train.clip_value,
            scaler=build_scaler(config.precision, device),
            skip_nonfinite=config.train.on_nonfinite is OnNonfinite.skip,
            strategy=self.strategy,
            weights=weights_of(self.task),
        )
        self._windows = self._all_windows()

    def _all_windows(self) -> Iterator[Window]:
        while True:
            yield from self.loader

    def update(self) -> tuple[Window, UpdateResult]:
        """Makes the next update. Its `sync_seconds` include the waits of all micro-steps."""
        window = next(self._windows)
        return window, self.update_of(window)

    def update_of(self, window: Iterable[Any]) -> UpdateResult:
        """Makes an update of a window, or of any micro-batches."""
        # A tool may go on for longer than the training would: at the learning rate of its last update.
        self.schedule.apply(min(self.accumulator.updates + 1, self.total_updates))
        if takes_closure(self.accumulator.optimizer):
            result = self.accumulator.run(window, self._output)
        else:
            result = self._accumulated(window)
        if self.syncing is not None:
            waited = self.syncing.take_waited_seconds()
            result = dataclasses.replace(result, sync_seconds=result.sync_seconds + waited)
        return result

    def _accumulated(self, window: Iterable[Any]) -> UpdateResult:
        if isinstance(self.task, CoupledTask):
            accumulate_coupled(self.accumulator, window, embed=self._embed, loss=self.task.window_loss)
        else:
            with self.accumulator.window(window) as micro_batches:
                for batch in micro_batches:
                    output = self._output(batch)
                    self.accumulator.backward(output.loss_sum, output.weight, output.sums, terms=output.terms)
        return self.accumulator.step()

    def _output(self, batch: Any) -> TaskOutput:
        with self.precision.autocast():
            return checked_output(self.task(self.strategy.model, batch))

    def _embed(self, batch: Any) -> Any:
        with self.precision.autocast():
            return self.task.embed(self.strategy.model, batch)

    def parameters(self) -> Tensor:
        """Returns all parameters as one vector, float64 on the CPU. Every rank calls it: sharded ones are gathered."""
        rows = []
        for parameter in self.strategy.module.parameters():
            value = parameter.detach()
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            rows.append(whole.to("cpu", torch.float64).reshape(-1))
        return torch.cat(rows)


def _some_batches(training: Training, count: int) -> tuple[list[Any], float]:
    """Returns `count` micro-batches of whole windows, in mixed order, and the mean samples of a micro-batch in these.

    By length the costliest come last in a window: in mixed order a few of them are like all of them.
    """
    batches: list[Any] = []
    samples = 0
    for window in training.loader.epoch(0):
        batches += list(window)
        samples += sum(window.sizes)
        if len(batches) >= count:
            break
    random.Random(0).shuffle(batches)
    return [*itertools.islice(itertools.cycle(batches), count)], samples / len(batches)


@dataclasses.dataclass(kw_only=True, slots=True)
class Measuring:
    """Measures one rank of a placement. Each method returns what JSON can hold."""

    config: TrainConfig
    device: torch.device
    rank: int
    world_size: int
    sync_every_step: bool
    reference: Path
    """File of the parameters' change in the float64 one-shot run."""
    _training: Training | None = None

    def prepare(self, curve_updates: int) -> dict[str, Any]:
        """Builds the training and makes its first updates: the loss curve, and the peak of the memory."""
        before, _ = peak_memory(self.device)
        training = self._training = self._start(self.config)
        curve = [training.update()[1].loss for _ in range(min(curve_updates, training.total_updates))]
        peak, kind = peak_memory(self.device)
        return {
            "loss_curve": curve,
            "memory_before": before,
            "peak_memory": peak,
            "memory_kind": kind,
            "micro_batch_sizes": list(next(iter(training.loader.epoch(0))).sizes),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU",
        }

    def exactness(self, updates: int, precision: str | None) -> dict[str, Any]:
        """Returns how far the parameters' change is from the reference's, after a few updates from the start.

        Args:
            precision: "fp64", or None for the configuration's own.
        """
        change = self._change(updates, PrecisionConfig(name=PrecisionName[precision]) if precision else None)
        wanted = torch.load(self.reference, weights_only=True)
        if wanted.shape != change.shape:
            raise ValueError(f"the reference has {wanted.numel()} parameters, this placement {change.numel()}")
        return {"error": float((change - wanted).norm() / wanted.norm())}

    def make_reference(self, updates: int) -> dict[str, Any]:
        """Writes the parameters' change in float64 to the file of the reference."""
        self.config = dataclasses.replace(self.config, compile=False)
        change = self._change(updates, PrecisionConfig(name=PrecisionName.fp64))
        torch.save(change, self.reference)
        return {"parameters": change.numel()}

    def round(self, updates: int, warmup_updates: int) -> dict[str, Any]:
        """Times updates of full windows."""
        if self._training is None:
            self._training = self._start(self.config)
        training = self._training
        full = min(training.loader.plan.global_batch_size, training.loader.num_samples)
        if dist.is_initialized():
            dist.barrier()
        for _ in range(warmup_updates):
            training.update()
        timed: dict[str, list[float]] = {"seconds": [], "data_seconds": [], "sync_seconds": []}
        result, traffic = None, training.strategy.traffic
        by_axis: dict[str, tuple[int, int]] = {}
        while len(timed["seconds"]) < updates:
            before = dict(traffic.by_axis)
            started = time.perf_counter()
            window, update = training.update()
            seconds = time.perf_counter() - started
            if window.num_samples < full:
                continue
            result = update
            by_axis = _since(before, traffic.by_axis)
            timed["seconds"].append(seconds)
            timed["data_seconds"].append(update.data_seconds)
            timed["sync_seconds"].append(update.sync_seconds)
        assert result is not None
        sent = {"sync_calls": result.sync_calls, "sync_bytes": result.sync_bytes, "sync_by_axis": by_axis}
        return {**timed, "samples": full, **sent}

    def facts(self) -> dict[str, Any]:
        """Returns what tuning depends on: whether lengths differ, and how large the gradients are."""
        training = self._training = self._training or self._start(self.config)
        lengths = training.lengths
        trained = [p for p in training.strategy.module.parameters() if p.requires_grad]
        return {
            "lengths_differ": lengths is not None and bool(np.ptp(np.asarray(lengths))),
            "gradient_bytes": sum(p.numel() * p.element_size() for p in trained),
            "device": self.device.type,
        }

    def compute(self, steps: list[int], rounds: int) -> dict[str, Any]:
        """Times updates with numbers of micro-steps, each rank by itself: all that an update takes but the network.

        Each number of micro-steps is measured with the same micro-batches, however unequal these are.

        Args:
            steps: divisors of the largest of them.
        """
        self._training = None  # its memory is needed
        alone = Training(self.config, self.device, rank=self.rank, world_size=self.world_size, alone=True)
        batches, samples = _some_batches(alone, 2 * max(steps))
        taken: dict[int, list[float]] = {count: [] for count in steps}
        alone.update_of(batches[: max(steps)])
        for _ in range(rounds):
            for count in steps:
                windows = [batches[first : first + count] for first in range(0, len(batches), count)]
                if dist.is_initialized():
                    dist.barrier()
                started = time.perf_counter()
                for window in windows:
                    alone.update_of(window)
                taken[count].append((time.perf_counter() - started) / len(windows))
        return {
            "seconds": {str(count): statistics.median(values) for count, values in taken.items()},
            "samples": samples,
        }

    def link(self, sizes: list[int], rounds: int) -> dict[str, Any]:
        """Times bare all-reduces of these numbers of bytes, smallest first."""
        found = time_all_reduces(sizes, rounds, self.device)
        return {"seconds": {str(size): seconds for size, seconds in found.items()}}

    def _start(self, config: TrainConfig) -> Training:
        return Training(
            config, self.device, rank=self.rank, world_size=self.world_size, sync_every_step=self.sync_every_step
        )

    def _change(self, updates: int, precision: PrecisionConfig | None) -> Tensor:
        config = self.config if precision is None else dataclasses.replace(self.config, precision=precision)
        training = self._start(config)
        before = training.parameters()
        for _ in range(updates):
            training.update()
        return training.parameters() - before


def _since(before: Mapping[str, tuple[int, int]], now: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Returns the collectives and bytes of each axis that have been added since."""
    none = (0, 0)
    return {
        axis: (calls - before.get(axis, none)[0], size - before.get(axis, none)[1])
        for axis, (calls, size) in now.items()
    }
