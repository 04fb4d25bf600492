"""Checks of transformers' language models on real ranks: the same update for any cut. Float64, to 1e-12."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import tiny_language_model
import torch
from examples import distance, flat, placed, replaced
from torch import Tensor, nn

from distaccum import Accumulator, WindowLoader
from distaccum.config import DDPConfig, FSDPConfig
from distaccum.config.enums import Accumulate
from distaccum.data import LanguageData
from distaccum.runtime.world import World
from distaccum.tasks import CausalLM, MixtureLM, mixture_lm, weights_of

CONFIGS = {
    "ddp": DDPConfig(),
    "ddp, zero": DDPConfig(shard_optimizer=True),
    "fsdp": FSDPConfig(),
    "fsdp, sharded": FSDPConfig(accumulate=Accumulate.sharded),
}
UPDATES = 2
ALONE = {"rank": 0, "world_size": 1}


@functools.cache
def chats() -> LanguageData:
    """19 chats of unequal lengths, so that of two windows of 12 the second is smaller."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_language_model.tokenizer().save_pretrained(folder)
        file = tiny_language_model.write_chats(Path(folder, "chats.jsonl"), 19)
        return LanguageData(str(file), folder, evaluation_fraction=0.0, max_length=48)


def model_of(kind: str) -> nn.Module:
    is_mixture = kind == "mixtral"
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2} if is_mixture else {}
    config = tiny_language_model.config_of(kind, **experts)
    options = {"experts_implementation": "eager"} if is_mixture else {}  # the other one knows no float64
    model: nn.Module = tiny_language_model.model_of(config, dtype=torch.float64, **options)
    return model.train()


def trained(kind: str, config: Any, task: CausalLM, world: World | None = None, **batch: Any) -> Tensor:
    """The parameters after a few updates."""
    module = model_of(kind)
    strategy = placed(module, config)
    optimizer = torch.optim.SGD(strategy.model.parameters(), lr=0.5, momentum=0.9)
    if isinstance(config, DDPConfig) and config.shard_optimizer:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        optimizer = ZeroRedundancyOptimizer(  # type: ignore[assignment]
            strategy.model.parameters(), torch.optim.SGD, lr=0.5, momentum=0.9
        )
    accumulator = Accumulator(strategy.model, optimizer, clip_norm=1.0, strategy=strategy, weights=weights_of(task))
    where = {"rank": world.rank, "world_size": world.world_size} if world else ALONE
    loader = WindowLoader(
        chats(), global_batch_size=12, equal_micro_steps=isinstance(config, FSDPConfig), seed=1, **where, **batch
    )
    while accumulator.updates < UPDATES:
        for window in loader:
            accumulator.run(window, functools.partial(task, strategy.model))
    return flat(strategy.module)


def by_transformers(kind: str) -> Tensor:
    """The same updates, each of a whole window at once, with the loss as the model itself computes it."""
    module = model_of(kind)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9)
    loader, updates = WindowLoader(chats(), global_batch_size=12, micro_batch_size=12, seed=1, **ALONE), 0
    while updates < UPDATES:
        for window in loader:
            (batch,) = window
            module(**batch, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            updates += 1
    return flat(module)


def check_every_cut_makes_the_update_of_transformers(world: World) -> None:
    kinds = {"llama": CONFIGS, "gpt2": {"fsdp": FSDPConfig()}} if world.world_size == 2 else {"gpt2": CONFIGS}
    for kind, configs in kinds.items():
        wanted = trained(kind, None, CausalLM(), micro_batch_size=12)
        # transformers computes the loss in float32.
        assert distance(wanted, by_transformers(kind)) < 1e-7, kind
        for name, config in configs.items():
            found = trained(kind, config, CausalLM(), world, micro_batch_size=2)
            assert distance(found, wanted) < 1e-12, (kind, name)
        found = trained(kind, DDPConfig(), CausalLM(), world, micro_batch_size=2, lengths=chats().lengths)
        assert distance(found, wanted) < 1e-12, (kind, "by length")


def check_a_mean_of_micro_batches_misses_it(world: World) -> None:
    """The negative control: each micro-batch's own mean, as loops without a count of the window's tokens take it."""

    class OfMicroBatch(CausalLM):
        def __call__(self, model: nn.Module, batch: Any) -> Any:
            output = super().__call__(model, batch)
            output.loss_sum, output.weight = output.loss_sum / output.weight, 1
            return output

    found = trained("llama", DDPConfig(), OfMicroBatch(), world, micro_batch_size=2)
    assert distance(found, by_transformers("llama")) > 1e-4


def check_experts_are_balanced_the_same_for_any_cut(world: World) -> None:
    wanted = trained("mixtral", None, MixtureLM(coefficient=0.5), micro_batch_size=12)
    for name in ("ddp", "fsdp"):
        config = CONFIGS[name]
        found = trained("mixtral", config, MixtureLM(coefficient=0.5, chunked_loss=True), world, micro_batch_size=2)
        assert distance(found, wanted) < 1e-12, name
    assert distance(trained("mixtral", None, CausalLM(), micro_batch_size=12), wanted) > 1e-4


def check_padding_and_cut_change_a_balance_over_micro_batches(world: World) -> None:
    """The negative control: the balance of all tokens of a micro-batch, as transformers' models compute it."""

    def together(batch: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        starts = torch.zeros_like(like, dtype=torch.bool)
        starts[0, 0] = True
        return torch.ones_like(starts), starts

    with replaced(mixture_lm, "_sequences", together):
        found = [trained("mixtral", None, MixtureLM(coefficient=0.5), micro_batch_size=size) for size in (2, 12)]
    assert distance(*found) > 1e-4
