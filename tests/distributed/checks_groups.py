"""Parameter groups and clipping by value: the updates of plain torch with groups made by hand. Float64, to 1e-12."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from examples import VOCABULARY, RaggedTokens, distance, flat, placed, token_loss
from torch import Tensor, nn

from distaccum import Accumulator, UserError, WindowLoader
from distaccum.config import DDPConfig, FSDPConfig
from distaccum.config.enums import Accumulate, LrRule
from distaccum.config.optimizers import AdamConfig
from distaccum.runtime.world import World
from distaccum.strategies import needs_equal_micro_steps, shards_optimizer
from distaccum.training.optim import Schedule, build_optimizer

CPU = torch.device("cpu")
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
PLACEMENTS: dict[str, Any] = {
    "single": None,
    "ddp": DDPConfig(),
    "zero-1": DDPConfig(shard_optimizer=True),
    "fsdp": FSDPConfig(),
    "fsdp, node": FSDPConfig(accumulate=Accumulate.node, shard_size=2),
}
ALONE = {"rank": 0, "world_size": 1}
UPDATES, SIZE, LR, DECAY = 7, 16, 0.03, 0.2
OPTIM: dict[str, Any] = {
    "groups": [{"match": ["head.*"], "name": "top", "lr": 0.1, "betas": [0.8, 0.9]}],
    "no_weight_decay": ["bias", "norm"],
    "layer_decay": 0.5,
}
BY_HAND: dict[str, dict[str, Any]] = {
    "embedding.weight": {"name": "embedding", "lr": LR / 8},
    "blocks.0.0.weight": {"name": "block0", "lr": LR / 4},
    "blocks.0.0.bias": {"name": "block0-no_weight_decay", "lr": LR / 4, "weight_decay": 0.0},
    "blocks.0.1.weight": {"name": "block0-no_weight_decay", "lr": LR / 4, "weight_decay": 0.0},
    "blocks.0.1.bias": {"name": "block0-no_weight_decay", "lr": LR / 4, "weight_decay": 0.0},
    "blocks.1.0.weight": {"name": "block1", "lr": LR / 2},
    "blocks.1.0.bias": {"name": "block1-no_weight_decay", "lr": LR / 2, "weight_decay": 0.0},
    "blocks.1.1.weight": {"name": "block1-no_weight_decay", "lr": LR / 2, "weight_decay": 0.0},
    "blocks.1.1.bias": {"name": "block1-no_weight_decay", "lr": LR / 2, "weight_decay": 0.0},
    "head.weight": {"name": "top-head", "lr": 0.1, "betas": (0.8, 0.9)},
    "head.bias": {"name": "top-head-no_weight_decay", "lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.0},
}


class MyRMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs / inputs.square().mean(-1, keepdim=True).add(1e-6).sqrt() * self.weight + self.bias


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(VOCABULARY, 8)
        norms = nn.LayerNorm(8), MyRMSNorm(8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), norm) for norm in norms)
        self.head = nn.Linear(8, VOCABULARY)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = hidden + torch.tanh(block(hidden))
        return torch.as_tensor(self.head(hidden))


def _factor(update: int) -> float:
    return 1 / (1 + 0.1 * update)


Found = tuple[Tensor, list[dict[str, float]], list[float]]


def _reference(clip_norm: float | None, clip_value: float | None) -> Found:
    """Plain torch: each window in one forward, groups by name, rates and decays by hand."""
    model = Blocks()
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault(BY_HAND[name]["name"], {"params": [], **BY_HAND[name]})["params"].append(parameter)
    optimizer = torch.optim.AdamW(groups.values(), lr=LR, weight_decay=DECAY)
    peaks = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    norms: list[dict[str, float]] = []
    total: list[float] = []
    loader = WindowLoader(RaggedTokens(), seed=1, global_batch_size=SIZE, micro_batch_size=SIZE, **ALONE)
    while len(norms) < UPDATES:
        for window in loader:
            (batch,) = list(window)
            loss_sum, weight = token_loss(model, batch)
            (loss_sum / weight).backward()
            gradients = {n: torch.cat([p.grad.flatten() for p in group["params"]]) for n, group in groups.items()}
            norms.append({name: float(gradient.norm()) for name, gradient in gradients.items()})
            total.append(float(torch.cat(list(gradients.values())).norm()))
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            if clip_value is not None:
                nn.utils.clip_grad_value_(model.parameters(), clip_value)
            ratio = (window.num_samples / SIZE) ** 0.5
            for group, (rate, decay) in zip(optimizer.param_groups, peaks, strict=True):
                group |= {"lr": rate * _factor(len(norms)) * ratio, "weight_decay": decay * ratio}
            optimizer.step()
            optimizer.zero_grad()
            if len(norms) == UPDATES:
                break
    return flat(model), norms, total


def _found(world: World, config: Any, optim: dict[str, Any], **clipping: float | None) -> Found:
    here = {"rank": world.rank, "world_size": world.world_size} if config is not None else ALONE
    strategy = placed(Blocks(), config)
    section = AdamConfig(_target_="torch.optim.AdamW", lr=LR, weight_decay=DECAY, **optim)
    shard = config is not None and shards_optimizer(config)
    optimizer = build_optimizer(section, strategy.module, CPU, shard=shard)
    schedule = Schedule(optimizer, _factor, LrRule.sqrt, LrRule.sqrt)
    accumulator = Accumulator(strategy.model, optimizer, strategy=strategy, **clipping)
    equal = config is not None and needs_equal_micro_steps(config)
    loader = WindowLoader(
        RaggedTokens(), seed=1, global_batch_size=SIZE, micro_batch_size=3, equal_micro_steps=equal, **here
    )
    results: list[Any] = []
    while len(results) < UPDATES:
        for window in loader:
            schedule.apply(len(results) + 1, window.num_samples / SIZE)
            with accumulator.window(window) as micro_batches:
                for batch in micro_batches:
                    accumulator.backward(*token_loss(strategy.model, batch))
            results.append(accumulator.step())
            schedule.after_update()
            if len(results) == UPDATES:
                break
    decays = {group["name"]: group["weight_decay"] for group in optimizer.param_groups} if optim else {}
    assert all(value == (0 if "no_weight" in name else DECAY) for name, value in decays.items()), "they are put back"
    return flat(strategy.module), [result.group_norms for result in results], [r.grad_norm for r in results]


def check_groups_and_clipping_are_those_of_plain_torch(world: World) -> None:
    for clipping in ({"clip_norm": 0.05, "clip_value": None}, {"clip_norm": None, "clip_value": 1e-3}):
        wanted, norms, total = _reference(**clipping)
        for name, config in PLACEMENTS.items():
            found = _found(world, config, OPTIM, **clipping)
            assert distance(found[0], wanted) < 1e-12, (name, clipping, distance(found[0], wanted))
            assert distance(found[2], total) < 1e-12, (name, clipping)
            for mine, theirs in zip(found[1], norms, strict=True):
                assert mine.keys() == theirs.keys()
                assert distance([mine[key] for key in theirs], list(theirs.values())) < 1e-12, (name, clipping)
        # Negative controls: without each of the keys, and without clipping, the comparison misses.
        for left_out in OPTIM:
            other = _found(world, None, {key: value for key, value in OPTIM.items() if key != left_out}, **clipping)
            assert distance(other[0], wanted) > 1e-4, (left_out, clipping)
        unclipped = _found(world, None, OPTIM, clip_norm=None, clip_value=None)
        assert distance(unclipped[0], wanted) > 1e-4, clipping


def check_norms_of_groups_need_no_wait_and_one_collective(world: World) -> None:
    from examples import CollectiveCounter

    counts: dict[bool, tuple[int, list[str]]] = {}
    for is_grouped in (False, True):
        strategy = placed(Blocks(), FSDPConfig())
        section = AdamConfig(lr=LR, **(OPTIM if is_grouped else {}))
        accumulator = Accumulator(
            strategy.model, build_optimizer(section, strategy.module, CPU), strategy=strategy, clip_norm=1.0
        )
        batch = RaggedTokens.collate_fn([RaggedTokens()[i] for i in range(4)])
        for _ in range(2):
            with CollectiveCounter() as counter, accumulator.window([batch, batch]) as micro_batches:
                for tokens in micro_batches:
                    accumulator.backward(*token_loss(strategy.model, tokens))
            with counter:
                accumulator.step()
        counts[is_grouped] = counter.host_syncs, [name for name, _ in counter.collectives]
    assert counts[True] == counts[False]


def two_groups(named_parameters: Any, lr: float) -> torch.optim.Optimizer:
    """A factory that looks at names and dimensions, as people write them."""
    named = list(named_parameters)
    vectors = [parameter for _, parameter in named if parameter.ndim < 2]
    matrices = [parameter for name, parameter in named if parameter.ndim > 1 and "embedding" not in name]
    rest = [parameter for name, parameter in named if "embedding" in name]
    groups = [{"params": vectors, "lr": 0.1, "name": "vectors"}, {"params": matrices}, {"params": rest, "momentum": 0}]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9)


def check_a_factory_of_groups_is_the_same_under_zero_and_fsdp(world: World) -> None:
    def trained(config: Any, build: Callable[..., torch.optim.Optimizer]) -> Tensor:
        strategy = placed(Blocks(), config)
        accumulator = Accumulator(strategy.model, build(strategy, config), strategy=strategy, clip_norm=None)
        batches = [RaggedTokens.collate_fn([RaggedTokens()[i] for i in range(k, k + 4)]) for k in (0, 4)]
        mine = batches if config is None else batches[world.rank % 2 :][:1]
        for _ in range(3):
            with accumulator.window(mine) as micro_batches:
                for batch in micro_batches:
                    accumulator.backward(*token_loss(strategy.model, batch))
            accumulator.step()
        return flat(strategy.module)

    section = {"_target_": f"{__name__}.two_groups", "lr": 0.02}

    def by_section(strategy: Any, config: Any) -> torch.optim.Optimizer:
        shard = config is not None and shards_optimizer(config)
        return build_optimizer(section, strategy.module, CPU, shard=shard)

    wanted = trained(None, lambda strategy, _: two_groups(strategy.module.named_parameters(), 0.02))
    assert distance(trained(None, by_section), wanted) < 1e-12
    for config in (DDPConfig(shard_optimizer=True), FSDPConfig()):
        assert distance(trained(config, by_section), wanted) < 1e-12
    without = trained(None, lambda strategy, _: torch.optim.SGD(strategy.module.parameters(), 0.02, momentum=0.9))
    assert distance(without, wanted) > 1e-3
    grouped = section | {"groups": [{"match": ["head.*"], "lr": 1.0}]}
    with pytest.raises(UserError, match=r"optim.groups: .*two_groups does not take groups.*named_parameters"):
        build_optimizer(grouped, Blocks(), CPU)
