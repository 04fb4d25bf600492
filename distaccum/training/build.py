"""Builds a trainer from a configuration: the one place where the parts of a run are put together.

`Parts` are what needs no other rank: data, windows, task, model. `build_trainer` then places the model, and
hands everything to the `Trainer`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distaccum.accumulation import Accumulator
from distaccum.accumulation.noise_scale import NoiseScale
from distaccum.accumulation.recovery import Recovery
from distaccum.checkpoints import Checkpoint, Checkpointer
from distaccum.checkpoints.frozen import frozen_parameters
from distaccum.config import (
    ByLengthBatchConfig,
    EarlyStoppingConfig,
    Fp16Config,
    PrecisionConfig,
    StrategyConfig,
    TrainConfig,
)
from distaccum.config import instantiate as targets
from distaccum.config.enums import Balance, BatchSchedule, OnNonfinite
from distaccum.config.launcher import launch
from distaccum.config.redaction import redacted
from distaccum.errors import UserError
from distaccum.loaders import WindowLoader
from distaccum.models.lora import is_adapter
from distaccum.observers import EarlyStopping
from distaccum.runtime.compilation import Compilation, CompileClock, resolve_compilation
from distaccum.runtime.devices import cast, resolve_precision
from distaccum.runtime.randomness import derived_seed, seed_everything
from distaccum.runtime.stop_signals import Interruption
from distaccum.runtime.world import World
from distaccum.strategies import Strategy, place, shards_optimizer
from distaccum.tasks import CoupledTask, checked_output, weights_of
from distaccum.training.adapt_cuts import CutTuning
from distaccum.training.auto_micro_batch import Fitting, settle_sizes
from distaccum.training.data import build_evaluation, build_window_loader, check_same_stream, loader_options
from distaccum.training.data_waits import DataWaits
from distaccum.training.deferred_model import DeferredModel, is_deferred
from distaccum.training.evaluated_weights import check_statistics
from distaccum.training.evaluation import Evaluator
from distaccum.training.export import check_exported, load_initial, saved_beside
from distaccum.training.layer_norms import LayerNorms, blocks_by_parameter
from distaccum.training.memory_line import MemoryLine
from distaccum.training.model import build_model_that_fits, into_training_mode, options_of, reads_weights_again
from distaccum.training.observers import build_observers
from distaccum.training.optim import Schedule, build_optimizer
from distaccum.training.packing import refuse_leaks
from distaccum.training.progress import COMPILED, scheduled_updates
from distaccum.training.run_folder import CHECKPOINTS, METRICS, RunFolder
from distaccum.training.schedules import schedule_factor
from distaccum.training.supervision import Supervision
from distaccum.training.task import built_task
from distaccum.training.trainer import Trainer
from distaccum.training.unfreezing import Unfreezing, require_within_run, unfreeze_updates
from distaccum.training.update import Updater
from distaccum.training.weight_average import WeightAverage

logger = logging.getLogger(__name__)


class Parts:
    """The parts that a configuration names, before the model is placed.

    The model is the same on every rank, and nothing in here waits for another rank.

    Args:
        equal_micro_steps: give all ranks equally many micro-steps, whatever the strategy.
        may_defer: leave the model without numbers until `initialise`, if the configuration says so.

    Attributes:
        module: on the CPU, or on the meta device if it is deferred; in the precision's parameter format.
        blocks: name of each parameter's block, where blocks are measured.
        woken: names of its parts that were built in evaluation mode and have been put into training mode.
        beside: what may have files to be saved beside the trained weights.

    Raises:
        UserError: the configuration or the data don't fit.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        *,
        rank: int = 0,
        world_size: int = 1,
        equal_micro_steps: bool = False,
        may_defer: bool = False,
    ) -> None:
        seed_everything(derived_seed(config.seed, "model"))
        self.precision = resolve_precision(config.precision.name, device)
        loading = loader_options(config.data, device, self.precision)
        self.train_data = targets.build(config.data.train, "data.train")
        self.loader = build_window_loader(
            config, self.train_data, loading, rank=rank, world_size=world_size, equal_micro_steps=equal_micro_steps
        )
        smallest = dataclasses.replace(self.loader.plan, global_batch_size=self.loader.sizes.rule.smallest)
        if config.insight.noise_scale and smallest.is_one_shot:
            logger.info(
                "insight.noise_scale: a window is one micro-batch here, and noise can't be measured from one part, so "
                "every %d updates it is cut into two; the update is the same but for rounding",
                config.insight.every_updates,
            )
        size = config.train.eval_batch_size or self.loader.cuts.micro_batch_size
        self.evaluation_data, self.evaluation_loader = build_evaluation(
            config, loading, rank=rank, world_size=world_size, batch_size=size, workers_of=self.loader
        )
        self.task = built_task(config.task)
        self.woken: list[str] = []
        self._deferred: DeferredModel | None = None
        options = options_of(config.model)[1]
        self._initial = str(options["init_from"]) if options.get("init_from") else None
        if may_defer and is_deferred(options, config.strategy):
            self._deferred = DeferredModel(lambda: self._model(config))
            self.module = self._deferred.module
        else:
            self.module = self._model(config)
            self._load()
        self.beside = [*saved_beside(self.module, self._initial), getattr(self.train_data, "tokenizer", None)]
        self.blocks: dict[str, str] = {}
        if config.insight.layers:
            self.blocks = blocks_by_parameter(self.module, getattr(config.strategy, "wrap", ()))

    def _model(self, config: TrainConfig) -> nn.Module:
        module = build_model_that_fits(config.model, self.train_data, getattr(config.strategy, "wrap", ()))
        check_exported(module, self._initial)
        self.woken = into_training_mode(module) if not config.train.keep_modes else []
        return cast(module, self.precision.parameter_dtype)

    def initialise(self, strategy: Strategy, config: StrategyConfig) -> None:
        """Gives the placed model its numbers, if it was deferred. Waits for no other rank.

        Raises:
            UserError: as for the constructor.
        """
        if self._deferred is not None:
            strategy.at_rest()
            self._deferred.initialise(strategy.module, strategy.device, config, is_loaded=self._initial is not None)
            self._load()

    def _load(self) -> None:
        if self._initial:
            load_initial(self.module, self._initial)
            logger.info("model.init_from: the weights come from %s", self._initial)


def compilation_of(config: TrainConfig, device: torch.device) -> Compilation | None:
    """Returns how the model is to be compiled; None for not at all.

    Raises:
        UserError: this machine can't.
    """
    if not config.compile:
        return None
    dynamic = config.compile_dynamic
    if dynamic is None and isinstance(config.batch, ByLengthBatchConfig):
        dynamic = True
    return resolve_compilation(config.compile_backend, dynamic, device)


def build_scaler(config: PrecisionConfig, device: torch.device) -> torch.amp.GradScaler | None:
    """Builds the gradient scaler of a precision; None for all but fp16."""
    if not isinstance(config, Fp16Config):
        return None
    return torch.amp.GradScaler(device.type, init_scale=config.init_scale, growth_interval=config.growth_interval)


@dataclass(frozen=True, slots=True)
class _Placed:
    """The placed model and its optimizer, with the methods that build what needs them."""

    config: TrainConfig
    parts: Parts
    strategy: Strategy
    optimizer: torch.optim.Optimizer

    def settle_sizes(self, plain: dict[str, Any], world: World, checkpoint: Checkpoint | None) -> Recovery | None:
        """Sets the largest micro-batch that fits on each rank, if it is to be found.

        Returns:
            How to go on when memory runs out all the same.
        """
        batch, parts = self.config.batch, self.parts
        if not batch.is_auto:
            return None
        if isinstance(parts.task, CoupledTask):
            raise UserError(
                f"batch.micro_batch_size=auto does not support {type(parts.task).__name__}, whose loss couples the "
                "samples of a window: its micro-batches can't be taken again one by one. Give a number."
            )

        def forward(module: nn.Module, batch: Any) -> Any:
            with parts.precision.autocast():
                return checked_output(parts.task(module, batch))

        lengths = parts.loader.cuts.lengths
        fitting = Fitting(
            parts.loader,
            self.strategy,
            forward,
            self.optimizer,
            lengths=lengths if lengths is not None else getattr(parts.train_data, "lengths", None),
            memory_share=batch.auto_memory,
            ranks_on_host=launch().local_world_size,
        )
        recovery = settle_sizes(fitting, plain, world, checkpoint)
        if parts.evaluation_loader is not None and self.config.train.eval_batch_size is None:
            parts.evaluation_loader.set_batch_size(parts.loader.cuts.micro_batch_size)
        return recovery

    def checkpointer(self, folder: RunFolder) -> Checkpointer | None:
        config = self.config.checkpoint
        if not config.enabled:
            return None
        if config.trainable_only is None:
            # Frozen adapters are drawn at random, and not read.
            has_drawn = any(map(is_adapter, frozen_parameters(self.strategy.module, self.optimizer)))
            is_read = reads_weights_again(self.config.model) and not has_drawn
            config = dataclasses.replace(config, trainable_only=is_read)
        return Checkpointer(
            folder.path / CHECKPOINTS,
            self.strategy.model,
            self.optimizer,
            config=config,
            strategy=self.strategy,
            timeout_seconds=self.config.distributed.timeout_seconds,
            files=[folder.path / METRICS],
        )

    def tuning(self, *, recovers: bool) -> CutTuning:
        insight, batch = self.config.insight, self.config.batch
        noise_scale = None
        if insight.noise_scale:
            noise_scale = NoiseScale(every_updates=insight.every_updates, smoothing=insight.smoothing)
        return CutTuning(
            self.parts.loader.cuts,
            self.strategy,
            measure_costs=isinstance(batch, ByLengthBatchConfig) and batch.measure_costs,
            balance_speed=batch.balance is Balance.speed,
            noise_scale=noise_scale,
            recovers=recovers,
        )

    def accumulator(
        self, flags: dict[str, Callable[[], bool]], tuning: CutTuning, waits: DataWaits, recovery: Recovery | None
    ) -> Accumulator:
        return Accumulator(
            self.strategy.model,
            self.optimizer,
            clip_norm=self.config.train.clip_norm,
            clip_value=self.config.train.clip_value,
            scaler=build_scaler(self.config.precision, self.strategy.device),
            skip_nonfinite=self.config.train.on_nonfinite is OnNonfinite.skip,
            strategy=self.strategy,
            flags=flags,
            reports=tuning.reports | waits.reports,
            time_micro_steps=tuning.needs_times,
            recovery=recovery,
            noise_scale=tuning.noise_scale,
            weights=weights_of(self.parts.task),
        )

    def layer_norms(self, accumulator: Accumulator) -> LayerNorms | None:
        insight = self.config.insight
        return LayerNorms(accumulator, self.parts.blocks, insight.every_updates) if insight.layers else None

    def evaluator(self, supervision: Supervision, averages: list[WeightAverage]) -> Evaluator | None:
        if self.parts.evaluation_loader is None:
            return None
        return Evaluator(
            strategy=self.strategy,
            task=self.parts.task,
            loader=self.parts.evaluation_loader,
            precision=self.parts.precision,
            supervision=supervision,
            data=self.parts.evaluation_data,
            averages=averages,
        )


def build_trainer(
    config: TrainConfig,
    world: World,
    device: torch.device,
    folder: RunFolder,
    plain: dict[str, Any],
    checkpoint: Checkpoint | None,
    interruption: Interruption,
) -> Trainer:
    """Builds the trainer of a configuration. What a rank can do alone comes before anything that ranks wait in.

    Args:
        plain: the configuration as plain dictionaries.
        checkpoint: the one that the run is to go on from, for those who continue files.
    """
    with world.together():
        parts = Parts(config, device, rank=world.rank, world_size=world.world_size, may_defer=True)
        factor, unfrozen = _by_update(config, parts.loader, checkpoint)
        compilation = compilation_of(config, device)
        observers, model_observers = build_observers(config, folder, checkpoint, is_main=world.is_main)
    strategy = _placed(config, parts, world, device, compilation)
    optimizer = _built_optimizer(config, strategy)
    placed = _Placed(config, parts, strategy, optimizer)
    recovery = placed.settle_sizes(plain, world, checkpoint)
    # Until here all ranks drew the same numbers, so that they built the same model; dropout must differ.
    seed_everything(derived_seed(config.seed, "rank", world.rank))
    averages = [WeightAverage(strategy, average) for average in config.train.averages]
    checkpointer = placed.checkpointer(folder)
    grace_seconds = config.checkpoint.grace_seconds if checkpointer is not None else math.inf
    supervision = Supervision(strategy, interruption, world.heartbeat, grace_seconds)
    compile_clock = CompileClock() if compilation is not None else None
    flags = _flags(supervision, checkpointer, compile_clock)
    tuning = placed.tuning(recovers=recovery is not None)
    accumulator = placed.accumulator(flags, tuning, waits := DataWaits(parts.loader), recovery)
    return Trainer(
        updater=Updater(
            task=parts.task,
            accumulator=accumulator,
            schedule=Schedule(optimizer, factor, config.batch.lr_rule, config.batch.weight_decay_rule),
            precision=parts.precision,
            supervision=supervision,
            memory_line=MemoryLine(strategy, optimizer, averages, is_compiled=compilation is not None),
            compile_clock=compile_clock,
            layer_norms=placed.layer_norms(accumulator),
        ),
        loader=parts.loader,
        loop=config.train,
        tuning=tuning,
        waits=waits,
        evaluator=placed.evaluator(supervision, averages),
        early_stopping=_early_stopping(config.train.early_stopping),
        averages=averages,
        unfreezing=Unfreezing(strategy, optimizer, unfrozen) if unfrozen else None,
        checkpointer=checkpointer,
        observers=observers,
        model_observers=model_observers,
        run_dir=folder.path,
        beside_weights=parts.beside,
        config=redacted(plain),
    )


def _flags(
    supervision: Supervision, checkpointer: Checkpointer | None, compile_clock: CompileClock | None
) -> dict[str, Callable[[], bool]]:
    flags = supervision.flags | (checkpointer.flags if checkpointer is not None else {})
    return flags if compile_clock is None else {**flags, COMPILED: compile_clock.has_news}


def _placed(
    config: TrainConfig, parts: Parts, world: World, device: torch.device, compilation: Compilation | None
) -> Strategy:
    check_same_stream(parts.train_data, world)
    strategy = place(parts.module, config.strategy, device, config.precision.name, compilation)
    with world.together():
        parts.initialise(strategy, config.strategy)
    refuse_leaks(parts.task, parts.train_data, parts.loader.cuts, strategy, parts.precision)
    return strategy


def _built_optimizer(config: TrainConfig, strategy: Strategy) -> torch.optim.Optimizer:
    shard = shards_optimizer(config.strategy)
    optimizer = build_optimizer(config.optim, strategy.module, strategy.device, shard=shard)
    check_statistics(strategy.module, optimizer)
    return optimizer


def _early_stopping(config: EarlyStoppingConfig) -> EarlyStopping | None:
    return EarlyStopping(config.metric, config.patience, config.goal) if config.metric else None


def _by_update(
    config: TrainConfig, loader: WindowLoader, checkpoint: Checkpoint | None
) -> tuple[Callable[[int], float], dict[int, list[str]]]:
    """Returns the learning rate's factor as a function of the update, and what is unfrozen before which update."""
    last = scheduled_updates(config, loader, checkpoint)
    unfrozen = unfreeze_updates(options_of(config.model)[1].get("unfreeze") or {})
    if config.batch.schedule is not BatchSchedule.noise or config.train.max_updates is not None:
        require_within_run(unfrozen, last)  # else it is not known
    return schedule_factor(config.schedule, last), unfrozen
