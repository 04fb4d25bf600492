"""Every built-in optimizer under every strategy: the update of one process, in float64, and a resume bit for bit."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
from examples import distance, flat, placed
from torch import Tensor, nn

from distaccum import Accumulator, Checkpointer, UserError
from distaccum.checkpoints import newest_whole
from distaccum.config import DDPConfig, DPConfig, FSDPConfig
from distaccum.config.enums import Implementation
from distaccum.config.optimizers import (
    AdadeltaConfig,
    AdafactorConfig,
    AdagradConfig,
    AdamaxConfig,
    AdamConfig,
    ASGDConfig,
    LionConfig,
    MuonConfig,
    NAdamConfig,
    RAdamConfig,
    RMSpropConfig,
    RpropConfig,
    ScheduleFreeConfig,
    ScheduleFreeSGDConfig,
    SGDConfig,
)
from distaccum.runtime.world import World
from distaccum.strategies import SingleStrategy, Strategy, shards_optimizer
from distaccum.strategies.dp import DPStrategy, ThreadedReplicas
from distaccum.strategies.optimizers import has_two_modes
from distaccum.training import buckets
from distaccum.training.evaluated_weights import evaluated_weights
from distaccum.training.optim import build_optimizer

CPU = torch.device("cpu")
buckets.BUCKET_BYTES = 64  # the few numbers here are stepped in several buckets, as those of a large model are
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

T = torch.optim
OPTIMIZERS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "sgd": (SGDConfig(lr=0.1), lambda p: T.SGD(p, 0.1)),
    "momentum": (SGDConfig(lr=0.1, momentum=0.9), lambda p: T.SGD(p, 0.1, 0.9)),
    "nesterov": (SGDConfig(lr=0.1, momentum=0.9, nesterov=True), lambda p: T.SGD(p, 0.1, 0.9, nesterov=True)),
    "adam": (AdamConfig(lr=0.1), lambda p: T.Adam(p, 0.1)),
    "amsgrad": (AdamConfig(lr=0.1, amsgrad=True), lambda p: T.Adam(p, 0.1, amsgrad=True)),
    "adamw": (
        AdamConfig(_target_="torch.optim.AdamW", lr=0.1, weight_decay=0.01),
        lambda p: T.AdamW(p, 0.1, weight_decay=0.01),
    ),
    "adagrad": (AdagradConfig(lr=0.1), lambda p: T.Adagrad(p, 0.1)),
    "adadelta": (AdadeltaConfig(lr=1.0), lambda p: T.Adadelta(p, 1.0)),
    "rmsprop": (RMSpropConfig(lr=0.01), lambda p: T.RMSprop(p, 0.01)),
    "radam": (RAdamConfig(lr=0.1, weight_decay=0.1), lambda p: T.RAdam(p, 0.1, weight_decay=0.1)),
    "nadam": (NAdamConfig(lr=0.1), lambda p: T.NAdam(p, 0.1)),
    "adamax": (AdamaxConfig(lr=0.1), lambda p: T.Adamax(p, 0.1)),
    "asgd": (ASGDConfig(lr=0.1, t0=1.0), lambda p: T.ASGD(p, 0.1, t0=1.0)),
    "adafactor": (AdafactorConfig(lr=0.1, weight_decay=0.1), lambda p: T.Adafactor(p, 0.1, weight_decay=0.1)),
    "rprop": (RpropConfig(lr=0.01), lambda p: T.Rprop(p, 0.01)),
    "lion": (LionConfig(lr=0.01, weight_decay=0.1), lambda p: PlainLion(p, 0.01, 0.1)),
    "muon": (MuonConfig(lr=0.1, adamw_lr_ratio=0.5), lambda p: PlainMuon(list(p))),
    "schedule_free": (
        ScheduleFreeConfig(lr=0.1, weight_decay=0.1),
        lambda p: schedulefree.AdamWScheduleFree(p, 0.1, weight_decay=0.1),
    ),
    "schedule_free_sgd": (ScheduleFreeSGDConfig(lr=0.1, foreach=True), lambda p: schedulefree.SGDScheduleFree(p, 0.1)),
}
"""Each as configured, and as torch alone has it."""
REFUSED = {
    ("adafactor", "fsdp"): "strategy=fsdp does not support Adafactor",
    ("muon", "fsdp"): "strategy=fsdp does not support optim=muon, which needs whole matrices",
    ("rprop", "fsdp"): "strategy=fsdp does not support Rprop",
    ("schedule_free", "zero-1"): "shard_optimizer=true does not support AdamWScheduleFree",
    ("schedule_free_sgd", "zero-1"): "shard_optimizer=true does not support SGDScheduleFree",
}
STRATEGIES: dict[str, Any] = {
    "single": None,
    "dp": DPConfig(replicas=2),
    "ddp": DDPConfig(),
    "zero-1": DDPConfig(shard_optimizer=True),
    "fsdp": FSDPConfig(),
}
DATA = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
WINDOWS = ((0, 8), (0, 7), (1, 8), (0, 7))
"""First and last sample of each, so that ranks have unequal shares."""
LENGTHS = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0], dtype=torch.float64)
"""The weight of each sample."""


class PlainMuon:
    """torch's two optimizers: Muon for the hidden matrix, of shape 3 × 4."""

    def __init__(self, parameters: list[Tensor]) -> None:
        hidden = [parameter for parameter in parameters if parameter.shape == (3, 4)]
        others = [parameter for parameter in parameters if parameter.shape != (3, 4)]
        self.muon = T.Muon(hidden, 0.1, 0.1, adjust_lr_fn="match_rms_adamw")
        self.adamw = T.AdamW(others, 0.05, (0.9, 0.95), weight_decay=0.1)

    def zero_grad(self) -> None:
        self.muon.zero_grad()
        self.adamw.zero_grad()

    def step(self) -> None:
        self.muon.step()
        self.adamw.step()


class PlainLion(torch.optim.Optimizer):
    """The paper's algorithm, tensor by tensor."""

    def __init__(self, params: Any, lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        for parameter in group["params"]:
            momentum = self.state[parameter].get("momentum", torch.zeros_like(parameter))
            update = torch.sign(0.9 * momentum + 0.1 * parameter.grad) + group["weight_decay"] * parameter
            parameter -= group["lr"] * update
            self.state[parameter]["momentum"] = 0.99 * momentum + 0.01 * parameter.grad


class Scaled(nn.Module):
    """With a parameter of no dimension, as CLIP's `logit_scale`, which FSDP can't have."""

    def __init__(self, *, is_scalar: bool) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.hidden = nn.Linear(4, 3)
        self.out = nn.Linear(3, 1)
        self.scale = nn.Parameter(torch.tensor(1.5) if is_scalar else torch.tensor([1.5]))
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(inputs))).squeeze(1) * self.scale


class Run:
    def __init__(self, world: World, optim: Any, config: Any, folder: Path) -> None:
        is_fsdp = isinstance(config, FSDPConfig)
        module = Scaled(is_scalar=not is_fsdp)
        self.strategy: Strategy = SingleStrategy(module)
        if isinstance(config, DPConfig):  # whose `place` wants to be alone
            self.strategy = DPStrategy(ThreadedReplicas(module, 2))
        elif config is not None:
            self.strategy = placed(module, config)
        is_spread = self.strategy.world_size > 1
        self.rank, self.world_size = (world.rank, world.world_size) if is_spread else (0, 1)
        self.updates = 0
        shard = config is not None and shards_optimizer(config)
        optimizer = build_optimizer(optim, self.strategy.module, CPU, shard=shard)
        self.checkpointer = Checkpointer(folder, self.strategy.model, optimizer, strategy=self.strategy)
        self.accumulator = Accumulator(self.strategy.model, optimizer, clip_norm=0.5, strategy=self.strategy)
        self.checkpointer.states["accumulator"] = self.accumulator

    def train(self, updates: int) -> Tensor:
        for first, last in WINDOWS[self.updates : self.updates + updates]:
            mine = torch.arange(first, last)[self.rank :: self.world_size]
            with self.accumulator.window(mine.split(2)) as micro_batches:
                for indices in micro_batches:
                    self.accumulator.backward(_loss_sum(self.strategy.model, indices), LENGTHS[indices].sum())
            self.accumulator.step()
        self.updates += updates
        self.strategy.at_rest()
        with evaluated_weights(self.strategy, self.accumulator.optimizer):
            return flat(self.strategy.module)


def _loss_sum(model: nn.Module, indices: Tensor) -> Tensor:
    error = model(DATA[indices]) - DATA[indices].sum(1)
    return (error.square() * LENGTHS[indices]).sum()


def _one_shot(
    make: Callable[[Any], torch.optim.Optimizer], *, is_scalar: bool, is_mean_of_means: bool = False
) -> Tensor:
    """Windows in one piece, with nothing but torch; or, wrongly, the mean of each half's mean."""
    module = Scaled(is_scalar=is_scalar)
    optimizer: Any = make(module.parameters())
    if has_two_modes(optimizer):
        optimizer.train()
    for first, last in WINDOWS:
        parts = torch.arange(first, last).chunk(2 if is_mean_of_means else 1)
        optimizer.zero_grad()
        for indices in parts:
            (_loss_sum(module, indices) / LENGTHS[indices].sum() / len(parts)).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
    if has_two_modes(optimizer):
        optimizer.eval()
    return flat(module)


def _check_one(world: World, optim: Any, config: Any, wanted: Tensor) -> None:
    is_spread = isinstance(config, DDPConfig | FSDPConfig)
    with tempfile.TemporaryDirectory() as own:
        folder = Path(world.from_main(own) if is_spread else own)
        run = Run(world, optim, config, folder)
        run.train(2)
        if world.world_size == 2:
            run.checkpointer.save(2, {}, wait=True)
        found = run.train(2)
        assert distance(found, wanted) < 1e-12
        if world.world_size > 2:
            return
        resumed = Run(world, optim, config, folder)
        gather: Callable[[Any], list[Any]] = world.gather if is_spread else lambda value: [value]
        checkpoint = newest_whole(folder, rank=world.rank if is_spread else 0, gather=gather)
        assert checkpoint is not None
        resumed.checkpointer.restore(checkpoint)
        resumed.updates = 2
        assert torch.equal(resumed.train(2), found)
        world.gather(None)  # before the folder goes


def check_every_optimizer_under_every_strategy(world: World) -> None:
    failures = []
    for name, (optim, make) in OPTIMIZERS.items():
        for placement, config in STRATEGIES.items():
            if world.world_size > 2 and placement in ("single", "dp"):  # as on 2 ranks
                continue
            try:
                if (name, placement) in REFUSED:
                    with pytest.raises(UserError, match=REFUSED[name, placement]):
                        _check_one(world, optim, config, torch.ones(1))
                    continue
                wanted = _one_shot(make, is_scalar=placement != "fsdp")
                _check_one(world, optim, config, wanted)
                wrong = _one_shot(make, is_scalar=placement != "fsdp", is_mean_of_means=True)
                assert distance(wrong, wanted) > 1e-6
            except Exception as error:
                failures.append(f"{name}, {placement}: {type(error).__name__}: {error}")
    assert not failures, "\n".join(failures)


class LooksAtParameters(torch.optim.AdamW):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__([parameter for parameter in params if parameter.ndim >= 0], lr=lr, foreach=True)


class GroupsByDimensions(torch.optim.SGD):
    def __init__(self, params: Any, lr: float) -> None:
        params = list(params)
        flat, rest = [p for p in params if p.ndim < 2], [p for p in params if p.ndim > 1]
        super().__init__([{"params": flat}, {"params": rest}], lr=lr)


def _own(optimizer: type, lr: float = 0.1) -> dict[str, Any]:
    module = "torch.optim" if optimizer.__module__.startswith("torch.") else optimizer.__module__
    return {"_target_": f"{module}.{optimizer.__name__}", "lr": lr}


def check_a_class_that_looks_at_its_parameters_can_be_sharded_by_zero(world: World) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(world.from_main(folder))
        section = _own(LooksAtParameters)
        found, wanted = (
            Run(world, section, config, path).train(3) for config in (DDPConfig(shard_optimizer=True), None)
        )
        assert distance(found, wanted) < 1e-12
        # More ranks than parameters: one of them has nothing to update.
        strategy = placed(nn.Linear(4, 1, bias=False), DDPConfig())
        optimizer = build_optimizer(section, strategy.model.parameters(), CPU, shard=True)
        accumulator = Accumulator(strategy.model, optimizer, strategy=strategy)
        with accumulator.window([DATA[:2].float()]) as micro_batches:
            for batch in micro_batches:
                accumulator.backward(strategy.model(batch).sum(), 2)
        accumulator.step()
        assert len(set(world.gather(flat(strategy.module).tolist().__repr__()))) == 1
        with pytest.raises(
            UserError, match=r"makes 2 parameter groups, and strategy.shard_optimizer=true can have one"
        ):
            Run(world, _own(GroupsByDimensions), DDPConfig(shard_optimizer=True), path)
        world.gather(None)


def check_optimizers_that_see_more_than_their_shard_are_refused(world: World) -> None:
    """All of these run under FSDP, or fail in the first step; those that run make other updates."""
    for optimizer in (torch.optim.Rprop, torch.optim.Adafactor, torch.optim.Muon):
        strategy = placed(nn.Linear(4, 6, bias=False), FSDPConfig())
        built = build_optimizer(_own(optimizer), strategy.model.parameters(), CPU)
        if optimizer is torch.optim.Rprop and torch.__version__ >= "2.15":
            Accumulator(strategy.model, built, strategy=strategy)  # its steps take shards there, number by number
            continue
        with pytest.raises(UserError, match=f"strategy=fsdp does not support {optimizer.__name__}: .*shard_optimizer"):
            Accumulator(strategy.model, built, strategy=strategy)
    strategy = placed(nn.Linear(4, 6), FSDPConfig())
    biases = [parameter for parameter in strategy.model.parameters() if parameter.ndim == 1]
    with pytest.raises(UserError, match="its steps of shards differ from those of the whole by"):
        Accumulator(strategy.model, torch.optim.Adafactor(biases), strategy=strategy)
    for optimizer in (torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax, torch.optim.ASGD):
        Accumulator(strategy.model, build_optimizer(_own(optimizer), strategy.model.parameters(), CPU))


def check_parameters_that_cannot_be_sharded_are_refused(world: World) -> None:
    for parameter, said in ((torch.tensor(1.0), r"shape \[\]"), (torch.zeros(0, 3), r"shape \[0, 3\]")):
        module = nn.Linear(2, 2)
        module.scale = nn.Parameter(parameter)
        with pytest.raises(UserError, match=f"strategy=fsdp can't shard scale, a parameter of {said}.*strategy=ddp"):
            placed(module, FSDPConfig())
    mixed = nn.Linear(2, 2)
    mixed.bias.data = mixed.bias.data.double()
    with pytest.raises(UserError, match=r"Linear has parameters of torch.float32 and torch.float64"):
        placed(mixed, FSDPConfig())
    model = placed(nn.Linear(2, 2), FSDPConfig()).model
    with pytest.raises(UserError, match=r"no fused torch.optim.SGD for the sharded parameters of strategy=fsdp"):
        build_optimizer(SGDConfig(implementation=Implementation.fused), model.parameters(), CPU)
