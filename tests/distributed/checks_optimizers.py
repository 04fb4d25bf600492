"""Every built-in optimizer under every strategy: the update of one process, in float64, and a resume bit for bit."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import distance, flat, placed
from torch import Tensor, nn

from distaccum import Accumulator, Checkpointer, UserError
from distaccum.checkpoints import newest_whole
from distaccum.config import DDPConfig, DPConfig, FSDPConfig
from distaccum.config.enums import Implementation
from distaccum.config.optimizers import AdadeltaConfig, AdagradConfig, AdamConfig, RMSpropConfig, SGDConfig
from distaccum.runtime.world import World
from distaccum.strategies import SingleStrategy, Strategy, shards_optimizer
from distaccum.strategies.dp import DPStrategy, ThreadedReplicas
from distaccum.training.optim import build_optimizer

CPU = torch.device("cpu")
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

OPTIMIZERS: dict[str, Any] = {
    "sgd": SGDConfig(lr=0.1),
    "momentum": SGDConfig(lr=0.1, momentum=0.9),
    "nesterov": SGDConfig(lr=0.1, momentum=0.9, nesterov=True),
    "adam": AdamConfig(lr=0.1),
    "amsgrad": AdamConfig(lr=0.1, amsgrad=True),
    "adamw": AdamConfig(_target_="torch.optim.AdamW", lr=0.1, weight_decay=0.01),
    "adagrad": AdagradConfig(lr=0.1),
    "adadelta": AdadeltaConfig(lr=1.0),
    "rmsprop": RMSpropConfig(lr=0.01),
}
STRATEGIES: dict[str, Any] = {
    "single": None,
    "dp": DPConfig(replicas=2),
    "ddp": DDPConfig(),
    "zero-1": DDPConfig(shard_optimizer=True),
    "fsdp": FSDPConfig(),
}
DATA = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


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
        self.mine = DATA[world.rank :: world.world_size] if is_spread else DATA
        shard = config is not None and shards_optimizer(config)
        optimizer = build_optimizer(optim, self.strategy.model.parameters(), CPU, shard=shard)
        self.checkpointer = Checkpointer(folder, self.strategy.model, optimizer, strategy=self.strategy)
        self.accumulator = Accumulator(self.strategy.model, optimizer, clip_norm=0.5, strategy=self.strategy)
        self.checkpointer.states["accumulator"] = self.accumulator

    def train(self, updates: int) -> Tensor:
        for _ in range(updates):
            with self.accumulator.window(self.mine.split(2)) as micro_batches:
                for batch in micro_batches:
                    error = self.strategy.model(batch) - batch.sum(1)
                    self.accumulator.backward(error.square().sum(), len(batch))
            self.accumulator.step()
        self.strategy.at_rest()
        return flat(self.strategy.module)


def _check_one(world: World, optim: Any, config: Any, wanted: Tensor | None) -> Tensor:
    is_spread = isinstance(config, DDPConfig | FSDPConfig)
    with tempfile.TemporaryDirectory() as own:
        folder = Path(world.from_main(own) if is_spread else own)
        run = Run(world, optim, config, folder)
        run.train(2)
        run.checkpointer.save(2, {}, wait=True)
        found = run.train(2)
        assert wanted is None or distance(found, wanted) < 1e-12
        resumed = Run(world, optim, config, folder)
        gather: Callable[[Any], list[Any]] = world.gather if is_spread else lambda value: [value]
        checkpoint = newest_whole(folder, rank=world.rank if is_spread else 0, gather=gather)
        assert checkpoint is not None
        resumed.checkpointer.restore(checkpoint)
        assert torch.equal(resumed.train(2), found)
        world.gather(None)  # before the folder goes
    return found


def check_every_optimizer_under_every_strategy(world: World) -> None:
    failures = []
    for name, optim in OPTIMIZERS.items():
        wanted = None
        for placement, config in STRATEGIES.items():
            try:
                wanted = _check_one(world, optim, config, wanted)
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
        with pytest.raises(UserError, match=f"strategy=fsdp does not support {optimizer.__name__}: .*shard_optimizer"):
            Accumulator(strategy.model, built, strategy=strategy)
    strategy = placed(nn.Linear(4, 6), FSDPConfig())
    biases = [parameter for parameter in strategy.model.parameters() if parameter.ndim == 1]
    with pytest.raises(UserError, match="its steps of shards differ from those of the whole by 1"):
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
