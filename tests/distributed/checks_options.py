"""Checks of activation checkpointing and frozen parameters, on real ranks."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from examples import flat
from torch import Tensor

from distaccum import Accumulator, UpdateResult, WindowLoader
from distaccum.config import DDPConfig, FSDPConfig
from distaccum.config.optimizers import AdamConfig
from distaccum.data.language.text import DocumentationText
from distaccum.models import GPT
from distaccum.runtime.world import World
from distaccum.strategies import needs_equal_micro_steps, place, shards_optimizer
from distaccum.strategies.optimizers import own_optimizer
from distaccum.tasks import LanguageModeling
from distaccum.training.model import checkpoint_blocks, freeze
from distaccum.training.optim import build_optimizer

CPU = torch.device("cpu")
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

PLACEMENTS: dict[str, Any] = {
    "ddp": DDPConfig(),
    "static graph": DDPConfig(static_graph=True),
    "zero-1": DDPConfig(shard_optimizer=True),
    "fsdp": FSDPConfig(),
    "fsdp, parameters kept": FSDPConfig(reshard_in_window=False),
}


def train(
    config: Any, world: World, *, checkpointing: bool = False, frozen: list[str] | None = None
) -> tuple[list[UpdateResult], Tensor, Tensor, int]:
    """Results, parameters after and before, and the number of parameters in this rank's optimizer state."""
    torch.manual_seed(0)
    module = GPT(vocab_size=256, max_length=16, num_layers=2, num_heads=2, width=16, dropout=0.2)
    if frozen:
        freeze(module, frozen)
    if checkpointing:
        checkpoint_blocks(module)
    before = flat(module).clone()
    strategy = place(module, config, CPU)
    optimizer = build_optimizer(AdamConfig(lr=1e-2), strategy.model.parameters(), CPU, shard=shards_optimizer(config))
    accumulator = Accumulator(strategy.model, optimizer, clip_norm=1.0, strategy=strategy)
    loader = WindowLoader(
        DocumentationText("evaluation", max_length=16),
        global_batch_size=12,
        micro_batch_size=2,
        rank=world.rank,
        world_size=world.world_size,
        equal_micro_steps=needs_equal_micro_steps(config),
    )
    torch.manual_seed(7 + world.rank)
    results = []
    for window in loader:
        with accumulator.window(window) as micro_batches:
            for batch in micro_batches:
                output = LanguageModeling()(strategy.model, batch)
                accumulator.backward(output.loss_sum, output.weight)
        results.append(accumulator.step())
        if len(results) == 3:
            break
    strategy.at_rest()
    inner = own_optimizer(optimizer)
    return results, flat(strategy.module), before, len(inner.state)


def check_checkpointing_changes_no_bit(world: World) -> None:
    for name, config in PLACEMENTS.items():
        results, parameters, _, _ = train(config, world)
        same_results, same_parameters, _, _ = train(config, world, checkpointing=True)
        assert [result.loss for result in results] == [result.loss for result in same_results], name
        assert torch.equal(parameters, same_parameters), name


def check_frozen_parameters_take_no_part(world: World) -> None:
    patterns = ["token_embedding.*", "blocks.0.*"]
    for name, config in PLACEMENTS.items():
        whole, _, _, whole_states = train(config, world)
        results, parameters, before, states = train(config, world, frozen=patterns, checkpointing=True)
        module = GPT(vocab_size=256, max_length=16, num_layers=2, num_heads=2, width=16)
        is_frozen = torch.cat(
            [
                torch.full((p.numel(),), name.startswith(("token_embedding.", "blocks.0.")))
                for name, p in module.named_parameters()
            ]
        )
        assert torch.equal(parameters[is_frozen], before[is_frozen]), name
        assert (parameters[~is_frozen] != before[~is_frozen]).float().mean() > 0.9, name
        assert world.gather(states) < world.gather(whole_states), name
        sent, sent_before = results[-1].sync_bytes, whole[-1].sync_bytes
        trainable = 4 * int((~is_frozen).sum())
        assert sent < 0.5 * sent_before, (name, sent, sent_before)
        if isinstance(config, DDPConfig):
            assert sent == trainable, (name, sent, trainable)
