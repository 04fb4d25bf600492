"""Checks of FSDP and of the sharded optimizer, on real ranks."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from examples import (
    CollectiveCounter,
    RaggedTokens,
    TokenClassifier,
    adamw,
    calls_in,
    curves,
    distance,
    flat,
    placed,
    token_loss,
    train_tokens,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from distaccum import Accumulator, EvaluationLoader, TaskOutput, UserError, WindowLoader, evaluate_model
from distaccum.config import DDPConfig, FSDPConfig
from distaccum.config.enums import PrecisionName
from distaccum.config.optimizers import AdamConfig
from distaccum.models import GPT
from distaccum.runtime.world import World
from distaccum.strategies import place, strategy_of
from distaccum.training.optim import build_optimizer

CPU = torch.device("cpu")
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

SHARDED = {
    "zero-1": DDPConfig(shard_optimizer=True),
    "fsdp": FSDPConfig(),
    "fsdp, parameters kept": FSDPConfig(reshard_in_window=False),
    "fsdp, the root alone": FSDPConfig(wrap=["Embedding"]),
}
WINDOWS: dict[str, tuple[int, dict[str, Any]]] = {
    "ragged": (4, {"global_batch_size": 16, "micro_batch_size": 2}),
    "uniform": (3, {"global_batch_size": 20, "accumulation_steps": 2, "drop_last": True}),
    "one sample left": (7, {"global_batch_size": 8, "micro_batch_size": 1}),
}
"""Updates, one more than an epoch of 41 samples has, and how windows are cut."""


def check_any_sharding_gives_the_same_update(world: World) -> None:
    for kind, (updates, batch) in WINDOWS.items():
        one_shot = {**batch, "micro_batch_size": batch["global_batch_size"]}
        one_shot.pop("accumulation_steps", None)
        wanted, wanted_parameters = train_tokens(None, updates=updates, **one_shot)
        for name, config in SHARDED.items():
            here = {"rank": world.rank, "world_size": world.world_size, "updates": updates}
            found, parameters = train_tokens(config, **here, **batch)
            for mine, reference in zip(curves(found), curves(wanted), strict=True):
                assert distance(mine, reference) < 1e-12, (kind, name)
            assert distance(parameters, wanted_parameters) < 1e-12, (kind, name)


def check_a_mean_of_means_misses_under_fsdp_too(world: World) -> None:
    def mean_of_means(model: nn.Module, batch: Any) -> tuple[Tensor, float]:
        loss_sum, weight = token_loss(model, batch)
        return loss_sum / weight.clamp(min=1), 1.0

    _, wanted = train_tokens(None, micro_batch_size=16)
    _, found = train_tokens(
        FSDPConfig(), rank=world.rank, world_size=world.world_size, micro_batch_size=2, loss=mean_of_means
    )
    assert distance(found, wanted) > 1e-2


def _collectives(world: World, config: FSDPConfig, steps: int) -> dict[str, float]:
    """Collectives of each kind per update, after the first."""

    def count(updates: int) -> dict[str, int]:
        with CollectiveCounter() as counter:
            results, _ = train_tokens(
                config,
                rank=world.rank,
                world_size=world.world_size,
                global_batch_size=32,
                accumulation_steps=steps,
                drop_last=True,
                updates=updates,
            )
        scatters = [size for name, size in counter.collectives if "reduce_scatter" in name]
        assert len(scatters) == sum(result.sync_calls for result in results)
        return {
            "reduce-scatters": len(scatters),
            "all-gathers": sum("allgather" in name or "all_gather" in name for name, _ in counter.collectives),
            "bytes": sum(result.sync_bytes for result in results),
        }

    few, many = count(1), count(3)
    return {name: (many[name] - few[name]) / 2 for name in few}


def check_reduce_scatters_do_not_grow_with_the_steps(world: World) -> None:
    by_steps = {steps: _collectives(world, FSDPConfig(), steps) for steps in (1, 2, 8)}
    for found in by_steps.values():
        assert found["reduce-scatters"] == by_steps[1]["reduce-scatters"] == 3
        assert found["bytes"] == by_steps[1]["bytes"]
    # The price of the least memory: parameters are gathered again for each micro-step.
    assert by_steps[8]["all-gathers"] > 3 * by_steps[1]["all-gathers"]


def check_all_gathers_do_not_grow_either_when_parameters_are_kept(world: World) -> None:
    by_steps = {steps: _collectives(world, FSDPConfig(reshard_in_window=False), steps) for steps in (1, 2, 8)}
    assert by_steps[1] == by_steps[2] == by_steps[8], by_steps
    assert by_steps[1]["all-gathers"] == 3, by_steps


def check_a_window_of_one_micro_step_takes_no_detour(world: World) -> None:
    """It is FSDP's own forward and backward, and nothing is switched off and on."""

    def switched(steps: int) -> int:
        def of(updates: int) -> int:
            return calls_in(
                FSDPModule,
                "set_requires_gradient_sync",
                lambda: train_tokens(
                    FSDPConfig(),
                    rank=world.rank,
                    world_size=world.world_size,
                    global_batch_size=32,
                    accumulation_steps=steps,
                    drop_last=True,
                    updates=updates,
                ),
            )

        return of(3) - of(1)  # without what happens when the model is placed

    assert switched(1) == 0
    assert switched(2) == 2 * 2, "off and on in each of two updates"


def check_each_rank_keeps_a_part(world: World) -> None:
    module = TokenClassifier()
    whole = sum(parameter.numel() for parameter in module.parameters())
    strategy = place(module, FSDPConfig(), CPU)
    mine = sum(parameter.to_local().numel() for parameter in strategy.model.parameters())
    assert sum(world.gather(mine)) == whole
    assert mine < 0.8 * whole

    zero = place(TokenClassifier(), DDPConfig(), CPU)
    optimizer = build_optimizer(AdamConfig(), zero.model.parameters(), CPU, shard=True)
    accumulator = Accumulator(zero.model, optimizer, strategy=zero)
    batch = RaggedTokens.collate_fn([RaggedTokens()[i] for i in range(4)])
    with accumulator.window([batch]) as micro_batches:
        for tokens in micro_batches:
            accumulator.backward(*token_loss(zero.model, tokens))
    accumulator.step()
    state = sum(v.numel() for s in optimizer.optim.state.values() for v in s.values() if v.ndim)  # type: ignore[attr-defined]
    assert sum(world.gather(state)) == 2 * whole
    assert state < 2 * whole


def check_an_evaluation_under_fsdp_is_exact(world: World) -> None:
    """Ranks have unequal numbers of samples, and of four ranks some none, but all take equally many forwards."""

    def task(model: nn.Module, batch: Any) -> TaskOutput:
        loss_sum, weight = token_loss(model, batch)
        return TaskOutput(loss_sum, weight, {"seen": torch.tensor(float(len(batch[0])))})

    strategy = place(TokenClassifier(), FSDPConfig(), CPU)
    for num_samples in (41, 3):
        data = RaggedTokens(num_samples)
        loader = EvaluationLoader(data, batch_size=2, equal_batches=True)
        assert len(set(world.gather(len(loader)))) == 1
        loss, weight, sums = evaluate_model(strategy.module, task, loader, device=CPU)
        loss_sum, valid = token_loss(TokenClassifier(), data.collate_fn(data.samples))
        assert math.isclose(loss, float(loss_sum.detach() / valid), rel_tol=1e-12)
        assert float(sums["seen"]) == num_samples
        assert weight == float(valid)


def check_an_exception_drops_what_fsdp_has_accumulated(world: World) -> None:
    def run(fail_first: bool) -> float:
        strategy = place(TokenClassifier(), FSDPConfig(), CPU)
        accumulator = Accumulator(strategy.model, adamw(strategy.model), strategy=strategy)
        window = next(iter(WindowLoader(RaggedTokens(), global_batch_size=16, accumulation_steps=2)))
        batches = list(window)

        def train(fails: bool) -> None:
            with accumulator.window(batches) as micro_batches:
                for batch in micro_batches:
                    accumulator.backward(*token_loss(strategy.model, batch))
                    if fails:
                        raise KeyError("in the middle of the window")

        if fail_first:
            with pytest.raises(KeyError):
                train(fails=True)
        train(fails=False)
        return accumulator.step().grad_norm

    assert math.isclose(run(fail_first=True), run(fail_first=False), rel_tol=1e-12)


def check_bf16_is_reduced_in_float32(world: World) -> None:
    strategy = place(TokenClassifier(torch.float32), FSDPConfig(), CPU, PrecisionName.bf16)
    accumulator = Accumulator(strategy.model, adamw(strategy.model), strategy=strategy)
    window = next(
        iter(WindowLoader(RaggedTokens(), global_batch_size=16, accumulation_steps=2, equal_micro_steps=True))
    )
    with CollectiveCounter() as counter, accumulator.window(window) as micro_batches:
        for inputs, targets in micro_batches:
            logits = strategy.model(inputs)
            assert logits.dtype == torch.bfloat16
            loss_sum, weight = token_loss(lambda _, logits=logits: logits.float(), (inputs, targets))  # type: ignore[arg-type]
            accumulator.backward(loss_sum, weight)
    result = accumulator.step()
    whole = flat(strategy.module)
    assert whole.dtype == torch.float32
    # Four bytes for each parameter, and some padding to equal shards.
    assert 4 * whole.numel() <= result.sync_bytes < 4.5 * whole.numel()
    assert sum("reduce_scatter" in name for name, _ in counter.collectives) == result.sync_calls


def check_gpt_blocks_are_wrapped_one_by_one(world: World) -> None:
    def gpt() -> GPT:
        torch.manual_seed(0)
        return GPT(num_layers=3, num_heads=2, width=8, vocab_size=16, max_length=16).double()

    strategy = place(gpt(), FSDPConfig(), CPU)
    wrapped = [type(m).__name__ for m in strategy.model.modules() if type(m).__name__.startswith("FSDP")]
    assert len(wrapped) == 4, wrapped
    tokens = torch.arange(8)[None]
    assert torch.allclose(strategy.model(tokens), gpt()(tokens), rtol=1e-12)
    assert strategy_of(strategy.model).equal_micro_steps


def check_what_fsdp_cannot_do_is_refused(world: World) -> None:
    images = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    with pytest.raises(UserError, match=r"^strategy=fsdp can't shard weight, whose memory is in another"):
        place(images, FSDPConfig(), torch.device("cpu"))
    with pytest.raises(UserError, match=r"strategy.wrap=\['Nowhere'\].* It has: .*Embedding"):
        place(TokenClassifier(), FSDPConfig(wrap=["Nowhere"]), CPU)


def check_shared_parameters_stay_with_the_root(world: World) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.embedding = nn.Embedding(11, 8)
            self.out = nn.Linear(8, 11, bias=False)
            self.out.weight = self.embedding.weight
            self.double()

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(self.embedding(tokens))

    def update(config: Any) -> Tensor:
        strategy = placed(Tied(), config)
        accumulator = Accumulator(strategy.model, adamw(strategy.model), strategy=strategy)
        batch = RaggedTokens.collate_fn([RaggedTokens()[i] for i in range(4)])
        for _ in range(3):
            with accumulator.window([batch, batch]) as micro_batches:
                for tokens in micro_batches:
                    accumulator.backward(*token_loss(strategy.model, tokens))
            accumulator.step()
        return flat(strategy.module)

    assert distance(update(FSDPConfig()), update(None)) < 1e-12
