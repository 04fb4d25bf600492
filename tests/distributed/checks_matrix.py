"""The matrix: any placement, any world size, any kind of window, the same updates as one shot. Float64, to 1e-12."""

from __future__ import annotations

from typing import Any

import torch
from examples import VOCABULARY, RaggedTokens, TokenClassifier, curves, distance, train_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from distaccum.config import DDPConfig, DPConfig, FSDPConfig, StrategyConfig
from distaccum.models import GPT
from distaccum.runtime.world import World
from distaccum.tasks import loss_in_head
from distaccum.tasks.chunked_loss import head_of

PLACEMENTS: dict[str, StrategyConfig] = {
    "ddp": DDPConfig(),
    "ddp, every option": DDPConfig(find_unused_parameters=True, gradient_as_bucket_view=False, bucket_cap_mb=0.001),
    "ddp + zero-1": DDPConfig(shard_optimizer=True),
    "fsdp": FSDPConfig(),
    "fsdp, parameters kept": FSDPConfig(reshard_in_window=False),
}
ONE_PROCESS: dict[str, StrategyConfig | None] = {
    "accumulated": None,
    **{f"dp, {count} replicas": DPConfig(replicas=count) for count in (1, 2, 4)},
}


def _placements(world: World) -> dict[str, tuple[StrategyConfig | None, dict[str, int]]]:
    here = {"rank": world.rank, "world_size": world.world_size}
    found: dict[str, tuple[StrategyConfig | None, dict[str, int]]] = {k: (c, here) for k, c in PLACEMENTS.items()}
    if world.world_size == 1:
        found |= {name: (config, {}) for name, config in ONE_PROCESS.items()}
    return found


def _compare(world: World, data: RaggedTokens, updates: int, seed: int, **batch: Any) -> None:
    whole = {"global_batch_size": batch["global_batch_size"], "drop_last": batch.get("drop_last", False)}
    options: dict[str, Any] = {"updates": updates, "seed": seed, "data": data}
    wanted, wanted_parameters = train_tokens(None, micro_batch_size=batch["global_batch_size"], **whole, **options)
    for name, (config, here) in _placements(world).items():
        found, parameters = train_tokens(config, **batch, **options, **here)
        for mine, reference in zip(curves(found), curves(wanted), strict=True):
            assert distance(mine, reference) < 1e-12, (name, batch)
        assert distance(parameters, wanted_parameters) < 1e-12, (name, batch)


def tied(dtype: torch.dtype) -> GPT:
    torch.manual_seed(5)
    return GPT(vocab_size=VOCABULARY, max_length=12, num_layers=1, num_heads=2, width=8).to(dtype)


def chunked_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    inputs, targets = batch
    return loss_in_head(model, lambda: model(inputs), targets, chunk=5).loss_sum, (targets != -100).sum()


def without_its_head(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    head_of(model).requires_grad_(False)
    return chunked_loss(model, batch)


def check_losses_in_chunks(world: World) -> None:
    """The head's parameters are gathered and synchronised as ever, though its forward is another; tied ones too."""
    if world.world_size > 2:
        return  # two ranks show what several do
    batch: dict[str, Any] = {"global_batch_size": 16, "updates": 3}
    placements = _placements(world)
    placements["fsdp, the head a block"] = (FSDPConfig(wrap=["Linear"]), placements["fsdp"][1])
    for model in (TokenClassifier, tied):
        wanted, wanted_parameters = train_tokens(None, micro_batch_size=16, model=model, **batch)
        for name, (config, here) in placements.items():
            if isinstance(config, DPConfig):
                continue
            options = {"model": model, "micro_batch_size": 3, **batch, **here}
            found, parameters = train_tokens(config, loss=chunked_loss, **options)
            for mine, reference in zip(curves(found), curves(wanted), strict=True):
                assert distance(mine, reference) < 1e-12, (name, model)
            assert distance(parameters, wanted_parameters) < 1e-12, (name, model)
    _, wanted_parameters = train_tokens(None, micro_batch_size=3, **batch)
    _, parameters = train_tokens(None, loss=without_its_head, micro_batch_size=3, **batch)
    assert distance(parameters, wanted_parameters) > 1e-3


def check_uniform_windows(world: World) -> None:
    _compare(world, RaggedTokens(length=6), 5, 1, global_batch_size=16, accumulation_steps=2, drop_last=True)


def check_ragged_windows(world: World) -> None:
    _compare(world, RaggedTokens(length=6), 4, 1, global_batch_size=16, micro_batch_size=3)
    # 33 samples: the last window of an epoch is a single sample, and all ranks but one have nothing to do.
    _compare(world, RaggedTokens(33, length=6), 4, 1, global_batch_size=16, micro_batch_size=3)


def check_unequal_lengths(world: World) -> None:
    _compare(world, RaggedTokens(), 4, 1, global_batch_size=16, micro_batch_size=3)
    _compare(world, RaggedTokens(), 5, 2, global_batch_size=11, accumulation_steps=2)


def check_cuts_by_length(world: World) -> None:
    lengths = [len(inputs) for inputs, _ in RaggedTokens().samples]
    _compare(world, RaggedTokens(), 4, 1, global_batch_size=16, micro_batch_size=3, lengths=lengths)
    # Windows of fewer samples than ranks have micro-steps, and a budget below the longest sample.
    _compare(world, RaggedTokens(), 4, 2, global_batch_size=5, micro_batch_size=1, lengths=lengths, max_tokens=4)


@settings(deadline=None, max_examples=6, derandomize=True, database=None)
@given(
    global_batch_size=st.integers(4, 20),
    micro_batch_size=st.integers(1, 4),
    samples=st.integers(20, 45),
    seed=st.integers(0, 99),
)
def _any_batch(world: World, global_batch_size: int, micro_batch_size: int, samples: int, seed: int) -> None:
    batch = {"global_batch_size": global_batch_size, "micro_batch_size": micro_batch_size}
    _compare(world, RaggedTokens(samples), 4, seed, **batch)


def check_any_batch_and_seed(world: World) -> None:
    """Derandomized: all ranks must draw the same examples."""
    _any_batch(world)
