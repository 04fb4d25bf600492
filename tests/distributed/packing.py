"""Models, samples and a loop that the tests of packing share: packed windows against padded ones in one shot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from examples import RaggedTokens, curves, distance, flat, placed
from torch import Tensor, nn

from distaccum import Accumulator, UpdateResult, WindowLoader
from distaccum.config import DDPConfig, FSDPConfig, StrategyConfig
from distaccum.config.optimizers import AdamConfig
from distaccum.loaders import PackCollate
from distaccum.models import GPT
from distaccum.runtime.torchvision_operators import tolerate_missing_operators
from distaccum.runtime.world import World
from distaccum.strategies import needs_equal_micro_steps, shards_optimizer
from distaccum.training.optim import build_optimizer

PLACEMENTS: dict[str, StrategyConfig] = {
    "ddp": DDPConfig(),
    "ddp + zero-1": DDPConfig(shard_optimizer=True),
    "fsdp": FSDPConfig(),
}
LENGTHS = [len(inputs) for inputs, _ in RaggedTokens().samples]


def gpt() -> nn.Module:
    torch.manual_seed(5)  # with positions for what a leaky one takes for a single sample
    return GPT(vocab_size=11, max_length=20, num_layers=2, num_heads=2, width=8).double()


def from_transformers(kind: str) -> nn.Module:
    tolerate_missing_operators()
    import transformers

    torch.manual_seed(5)
    if kind == "gpt2":
        sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 20}
        dropouts = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
        found: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=11, **sizes, **dropouts))
    else:
        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        found = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(vocab_size=11, num_key_value_heads=1, max_position_embeddings=20, **sizes)
        )
    found.double()
    return found  # type: ignore[no-any-return]


class ForTransformers(RaggedTokens):
    """The same samples as mappings, with labels of the same places: each begins with one that nothing predicts."""

    def __getitem__(self, index: int) -> Any:
        tokens, targets = self.samples[index]
        return {"input_ids": tokens, "labels": targets}

    @staticmethod
    def collate_fn(samples: list[Any]) -> Any:
        inputs, labels = RaggedTokens.collate_fn([(sample["input_ids"], sample["labels"]) for sample in samples])
        return {"input_ids": inputs, "labels": labels}


def train(
    config: StrategyConfig | None,
    model: Callable[[], nn.Module],
    task: Any,
    data: RaggedTokens,
    updates: int,
    **batch: Any,
) -> tuple[list[UpdateResult], Tensor]:
    strategy = placed(model(), config)
    optimizer = build_optimizer(
        AdamConfig(_target_="torch.optim.AdamW", lr=1e-2, weight_decay=0.01),
        strategy.model.parameters(),
        torch.device("cpu"),
        shard=config is not None and shards_optimizer(config),
    )
    accumulator = Accumulator(strategy.model, optimizer, clip_norm=0.5, strategy=strategy)
    equal = config is not None and needs_equal_micro_steps(config)
    loader = WindowLoader(data, seed=1, equal_micro_steps=equal, global_batch_size=16, **batch)
    results: list[UpdateResult] = []
    while len(results) < updates:
        for window in loader:
            with accumulator.window(window) as micro_batches:
                for micro_batch in micro_batches:
                    output = task(strategy.model, micro_batch)
                    accumulator.backward(output.loss_sum, output.weight)
            results.append(accumulator.step())
            if len(results) == updates:
                break
    return results, flat(strategy.module)


def assert_equal(
    world: World,
    model: Callable[[], nn.Module],
    task: Any,
    data: RaggedTokens,
    budgets: tuple[int, ...] = (20, 9),
    updates: int = 4,
) -> None:
    """Asserts that packed windows give the updates of padded ones, in every placement, and that leaks would show.

    41 samples in windows of 16: the last window of an epoch is ragged.

    Args:
        budgets: of a micro-batch, in tokens; 9 are less than the longest sample has.
    """
    whole = {"rank": 0, "world_size": 1, "micro_batch_size": 16}
    wanted, wanted_parameters = train(None, model, task, data, updates, **whole)
    here = {"rank": world.rank, "world_size": world.world_size, "lengths": LENGTHS, "packed": True}
    placements: dict[str, StrategyConfig | None] = {**PLACEMENTS} if world.world_size > 1 else {"single": None}
    for name, config in placements.items():
        for max_tokens in budgets:
            found, parameters = train(config, model, task, data, updates, max_tokens=max_tokens, **here)
            for mine, reference in zip(curves(found), curves(wanted), strict=True):
                assert distance(mine, reference) < 1e-12, (name, max_tokens)
            assert distance(parameters, wanted_parameters) < 1e-12, (name, max_tokens)
    if world.world_size == 1:
        _, leaky = train(None, model, task, data, updates, max_tokens=20, collate_fn=_without_borders, **here)
        assert distance(leaky, wanted_parameters) > 1e-6, "positions that go on, and attention across samples"


def _without_borders(samples: list[Any]) -> Any:
    packed = PackCollate()(samples)
    if isinstance(packed, dict):
        # From 0 at the first target of each sample, so that the task still leaves it out.
        return {key: value for key, value in packed.items() if key != "position_ids"} | {
            "labels": packed["labels"].where(packed["position_ids"] != 0, -100)
        }
    inputs, targets = packed
    return {**inputs, "sample_lengths": inputs["sample_lengths"].sum()[None]}, targets
