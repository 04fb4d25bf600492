"""Parameters that are unfrozen on the way, against one shot of plain torch: float64, to 1e-12, ragged windows."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from checks_matrix import PLACEMENTS
from examples import RaggedTokens, TokenClassifier, distance, flat, placed, token_loss
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distaccum import Accumulator, WindowLoader
from distaccum.accumulation.noise_scale import NoiseScale
from distaccum.config import DDPConfig, StrategyConfig
from distaccum.config.enums import Compression
from distaccum.config.optimizers import AdamConfig, SGDConfig
from distaccum.errors import UserError
from distaccum.runtime.world import World
from distaccum.strategies import DDPStrategy, needs_equal_micro_steps, shards_optimizer
from distaccum.training.optim import build_optimizer
from distaccum.training.unfreezing import Unfreezing

CPU = torch.device("cpu")
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
UPDATES = 8
AT = {3: ["hidden.*"], 5: ["hidden.weight", "embedding.*"]}
OPTIMIZERS: dict[str, tuple[Any, Any]] = {
    "momentum": (
        SGDConfig(lr=0.3, momentum=0.9, weight_decay=0.05),
        lambda parameters: torch.optim.SGD(parameters, lr=0.3, momentum=0.9, weight_decay=0.05),
    ),
    "adamw": (
        AdamConfig(_target_="torch.optim.AdamW", lr=3e-2, weight_decay=0.2),
        lambda parameters: torch.optim.AdamW(parameters, lr=3e-2, weight_decay=0.2),
    ),
}


def in_one_shot(kind: str, due: Mapping[str, int], updates: int = UPDATES) -> tuple[list[float], list[float], Tensor]:
    """Losses, gradient norms and parameters of a plain loop; `due` says by names' beginnings when they are unfrozen."""
    module = TokenClassifier()
    optimizer = OPTIMIZERS[kind][1](module.parameters())
    losses, norms = [], []
    batch = {"global_batch_size": 16, "micro_batch_size": 16}
    loader = WindowLoader(RaggedTokens(), seed=1, rank=0, world_size=1, **batch)
    windows = (window for _ in range(updates) for window in loader)
    for update, window in zip(range(1, updates + 1), windows, strict=False):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(update >= due.get(name.partition(".")[0], 1))
            parameter.grad = None
        (samples,) = window
        loss_sum, weight = token_loss(module, samples)
        (loss_sum / weight).backward()
        norms.append(nn.utils.clip_grad_norm_(module.parameters(), 0.5).item())
        optimizer.step()
        losses.append((loss_sum / weight).item())
    return losses, norms, flat(module)


class Loop:
    """The loop of `in_one_shot` on any placement."""

    def __init__(self, world: World, config: StrategyConfig | None, kind: str, **options: Any) -> None:
        self.strategy = placed(TokenClassifier(), config, options.pop("compilation", None))
        self.optimizer = build_optimizer(
            OPTIMIZERS[kind][0],
            self.strategy.model.parameters(),
            CPU,
            shard=config is not None and shards_optimizer(config),
        )
        self.accumulator = Accumulator(
            self.strategy.model, self.optimizer, clip_norm=0.5, strategy=self.strategy, **options
        )
        self.loader = WindowLoader(
            RaggedTokens(),
            global_batch_size=16,
            micro_batch_size=3,
            seed=1,
            rank=world.rank if config else 0,
            world_size=world.world_size if config else 1,
            equal_micro_steps=config is not None and needs_equal_micro_steps(config),
        )

    def train(self, before_update: Any, updates: int = UPDATES) -> tuple[list[float], list[float], Tensor]:
        results = []
        windows = (window for _ in range(updates) for window in self.loader)
        for update, window in zip(range(1, updates + 1), windows, strict=False):
            before_update(update)
            with self.accumulator.window(window) as micro_batches:
                for batch in micro_batches:
                    self.accumulator.backward(*token_loss(self.strategy.model, batch))
            results.append(self.accumulator.step())
        self.strategy.at_rest()
        return [r.loss for r in results], [r.grad_norm for r in results], flat(self.strategy.module)


def assert_same(found: Any, wanted: Any, about: Any) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert distance(one, other) < 1e-12, (about, one, other)


def check_every_placement_unfreezes_as_one_shot_does(world: World) -> None:
    placements: dict[str, StrategyConfig | None] = {"single": None, **PLACEMENTS}
    for kind in OPTIMIZERS:
        wanted = in_one_shot(kind, {"hidden": 3, "embedding": 5})
        late = in_one_shot(kind, {"hidden": 4, "embedding": 5})
        assert all(distance(one, other) > 1e-4 for one, other in zip(late, wanted, strict=True))
        for name, config in placements.items():
            loop = Loop(world, config, kind)
            unfreezing = Unfreezing(loop.strategy, loop.optimizer, AT)
            assert_same(loop.train(unfreezing.go_to), wanted, (kind, name))


def check_own_loops_rebuild_the_strategy(world: World) -> None:
    wanted = in_one_shot("momentum", {"hidden": 3})
    for name, config in PLACEMENTS.items():
        loop = Loop(world, config, "momentum", noise_scale=NoiseScale(every_updates=2, smoothing=0.9))
        hidden = loop.strategy.module.get_submodule("hidden")

        def set_trained(update: int, loop: Loop = loop, hidden: nn.Module = hidden) -> None:
            if update in (1, 3):
                loop.strategy.at_rest()
                hidden.requires_grad_(update == 3)
                loop.strategy.rebuild()

        assert_same(loop.train(set_trained), wanted, name)
        if isinstance(loop.strategy, DDPStrategy):
            # Without it, the message names it: where a window has come in between, and where none has.
            for thawed in (2, 1):
                hidden.requires_grad_(False)
                loop.strategy.rebuild()
                with pytest.raises(UserError, match=r"hidden.weight, hidden.bias\. .*strategy\.rebuild\(\)"):
                    loop.train(lambda update, at=thawed, part=hidden: part.requires_grad_(update >= at), updates=2)


def check_what_cannot_follow_says_why(world: World) -> None:
    for config, reason in (
        (DDPConfig(static_graph=True), "static_graph=true fixes which"),
        (DDPConfig(compression=Compression.powersgd), "PowerSGD keeps a state"),
    ):
        loop = Loop(world, config, "adamw")
        with pytest.raises(UserError, match=reason):
            Unfreezing(loop.strategy, loop.optimizer, AT)


def check_strategies_of_one_model_follow_together(world: World) -> None:
    """Their hook goes to the new reducer, and parameters that DDP waits for in vain are named as they are now."""
    model = DistributedDataParallel(TokenClassifier())
    first = DDPStrategy(model)
    model.module.embedding.requires_grad_(False)
    second = DDPStrategy(model)
    second.rebuild()
    calls = first.traffic.calls
    model(torch.zeros(2, 3, dtype=torch.int64)).sum().backward()
    assert first.traffic.calls > calls
    assert model.module.embedding.weight.grad is None
    model.module.out.forward = lambda inputs: inputs  # type: ignore[method-assign]
    model(torch.zeros(2, 3, dtype=torch.int64)).sum().backward()
    with pytest.raises(UserError, match=r"doesn't reach out\.weight, out\.bias on rank"):
        first.require_sync(-1, ())
