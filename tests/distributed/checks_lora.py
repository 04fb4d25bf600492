"""Checks of low-rank adapters on real ranks: the same update for any cut. Float64, to 1e-12."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tiny_language_model
import torch
from checks_deferred import built, deferred, differences
from checks_language import ALONE, CONFIGS, UPDATES, chats
from examples import distance, flat, placed
from safetensors.torch import load_file
from torch import Tensor, nn

from distaccum import Accumulator, Checkpointer, UserError, WindowLoader
from distaccum.config import CheckpointConfig, FSDPConfig
from distaccum.config.lora import LoraConfig
from distaccum.config.optimizers import SGDConfig
from distaccum.models import causal_lm
from distaccum.models.lora import add_adapters, base_name, is_adapter
from distaccum.runtime.devices import cast
from distaccum.runtime.sharded import local_part
from distaccum.runtime.world import World
from distaccum.strategies import Strategy, shards_optimizer
from distaccum.tasks import CausalLM, weights_of
from distaccum.training.export import adapter_tensors, export_trained, load_initial
from distaccum.training.optim import build_optimizer

NAMES = ["c_attn", "c_proj"]


def plain_model(kind: str) -> nn.Module:
    model: nn.Module = tiny_language_model.model_of(tiny_language_model.config_of(kind), dtype=torch.float64)
    return model.train()


def model_of(kind: str, checkpointing: bool = False, **lora: Any) -> Any:
    """B is random too, so that all adapters have gradients in the first update already."""
    model: Any = plain_model(kind)
    add_adapters(model, LoraConfig(rank=4, alpha=5.0, **lora), "base")
    model.double()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def accumulator_of(model: nn.Module, config: Any, task: Any = None) -> Accumulator:
    strategy = placed(model, config)
    shard = config is not None and shards_optimizer(config)
    settings = SGDConfig(lr=0.5, momentum=0.9)
    optimizer = build_optimizer(settings, strategy.module, torch.device("cpu"), shard=shard)
    return Accumulator(
        strategy.model, optimizer, clip_norm=1.0, strategy=strategy, weights=weights_of(task or CausalLM())
    )


def trained(model: nn.Module, config: Any, world: World | None = None, task: Any = None, **batch: Any) -> Strategy:
    accumulator = accumulator_of(model, config, task)
    train(accumulator, config, world, task, **batch)
    return accumulator.strategy


def train(accumulator: Accumulator, config: Any, world: World | None, task: Any = None, **batch: Any) -> None:
    where = {"rank": world.rank, "world_size": world.world_size} if world else ALONE
    equal, model = isinstance(config, FSDPConfig), accumulator.strategy.model
    loader = WindowLoader(chats(), global_batch_size=12, equal_micro_steps=equal, seed=1, **where, **batch)
    while accumulator.updates < UPDATES:
        for window in loader:
            accumulator.run(window, functools.partial(task or CausalLM(), model))


@functools.cache
def by_hand() -> Tensor:
    """The same updates by plain torch: whole windows, and each adapter multiplied out into its layer's weight."""
    model = model_of("gpt2", targets=NAMES)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.5, momentum=0.9)
    plain = plain_model("gpt2")
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    loader, updates = WindowLoader(chats(), global_batch_size=12, micro_batch_size=12, seed=1, **ALONE), 0
    while updates < UPDATES:
        for (batch,) in loader:
            weights = {
                f"{name}.weight": layer.base_layer.weight
                + 5 / 4 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).T
                for name, layer in layers.items()
            }
            logits = torch.func.functional_call(plain, weights, (), {**batch, "use_cache": False}).logits
            targets = batch["labels"][:, 1:]
            loss_sum = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="sum")
            (loss_sum / (targets != -100).sum()).backward()
            nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            updates += 1
    return flat(model)


def check_every_cut_makes_the_update_of_one_shot(world: World) -> None:
    wanted = by_hand()
    assert distance(wanted, flat(model_of("gpt2", targets=NAMES))) > 1e-3
    for name, config in {"single": None, **CONFIGS}.items():
        for checkpointing in (False, True) if name in ("ddp", "fsdp") else (False,):
            model = model_of("gpt2", checkpointing, targets=NAMES)
            here = world if config is not None else None
            strategy = trained(model, config, here, micro_batch_size=2)
            assert distance(flat(strategy.module), wanted) < 1e-12, (name, checkpointing)


def check_a_mean_of_micro_batches_misses_it(world: World) -> None:
    class OfMicroBatch(CausalLM):
        def __call__(self, model: nn.Module, batch: Any) -> Any:
            output = super().__call__(model, batch)
            output.loss_sum, output.weight = output.loss_sum / output.weight, 1
            return output

    model = model_of("gpt2", targets=NAMES)
    found = trained(model, CONFIGS["ddp"], world, OfMicroBatch(), micro_batch_size=2)
    assert distance(flat(found.module), by_hand()) > 1e-4


def check_adapters_alone_cross_the_network(world: World) -> None:
    for name in ("ddp", "fsdp"):
        model = model_of("llama")
        size = sum(p.nbytes for key, p in model.named_parameters() if is_adapter(key))
        strategy = trained(model, CONFIGS[name], world, micro_batch_size=2)
        # DDP sends a few numbers of the window with them.
        assert UPDATES * size <= strategy.traffic.bytes < UPDATES * size * 1.1, (name, strategy.traffic.bytes, size)


def check_what_is_saved_is_what_peft_loads(world: World) -> None:
    """Of a sharded model as of a whole one, adapters and merged; gpt2 has layers whose weights are transposed."""
    import peft
    import transformers

    for kind in ("llama", "gpt2"):
        for merge in (False, True):
            one = trained(model_of(kind, merge=merge), None, micro_batch_size=12).module
            strategy = trained(model_of(kind, merge=merge), FSDPConfig(), world, micro_batch_size=2)
            with tempfile.TemporaryDirectory() as text:
                folder = Path(text)
                export_trained(strategy, folder, is_main=True)
                if not merge:
                    found = load_file(folder / "adapter_model.safetensors")
                    wanted: Any = peft.get_peft_model_state_dict(one, save_embedding_layers=False)
                    assert {f"base_model.model.{key}" for key in wanted} == found.keys()
                    assert all(distance(found[f"base_model.model.{key}"], wanted[key]) < 1e-12 for key in wanted)
                    assert found.keys() == adapter_tensors(one).keys()
                    continue
                one.config.save_pretrained(folder)
                merged = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
                tokens = torch.arange(12)[None]
                with torch.no_grad():
                    assert distance(merged(tokens).logits, one.eval()(tokens).logits) < 1e-12, kind
                assert json.loads((folder / "config.json").read_text())["model_type"] == kind


def check_a_checkpoint_holds_what_trains(world: World) -> None:
    """On the same ranks it goes on bit for bit, on one to 1e-12; frozen weights that have changed are in it."""
    plain = model_of("llama")
    sizes = {name: p.nbytes for name, p in plain.named_parameters()}
    frozen = {name for name in sizes if not is_adapter(name)}
    every = {}
    configs = {name: CONFIGS[name] for name in ("ddp", "ddp, zero", "fsdp")}
    for kind, config in {**configs, "replicas": FSDPConfig(shard_size=1)}.items():
        folder = Path(world.from_main(tempfile.mkdtemp()))
        accumulator, checkpointer = saving(folder, config)
        train(accumulator, config, world, micro_batch_size=2)
        checkpointer.save(UPDATES, {}, wait=True)
        first = checkpointer.newest()
        assert first is not None
        assert first.frozen.keys() == frozen
        every[kind] = first.frozen
        held = sum(path.stat().st_size for path in first.path.glob("*.safetensors"))
        adapters = sum(size for name, size in sizes.items() if name not in frozen)
        assert held < 3 * adapters + 60_000 < sum(sizes.values()), (kind, held, adapters)  # and generators, names
        ends = []
        for going_on, on in ((config, world), (None, None)):
            other, resumed = saving(folder, going_on)
            resumed.restore(first)
            assert torch.equal(flat(other.strategy.module), flat(accumulator.strategy.module)), kind
            train(other, going_on, on, micro_batch_size=2)
            ends.append(flat(other.strategy.module))
        accumulator.load_state_dict({**accumulator.state_dict(), "updates": 0})
        train(accumulator, config, world, micro_batch_size=2)
        wanted = flat(accumulator.strategy.module)
        assert torch.equal(ends[0], wanted), kind
        assert distance(ends[1], wanted) < 1e-12, kind
        accumulator.strategy.at_rest()
        embedding = dict(accumulator.strategy.module.named_parameters())["model.embed_tokens.weight"]
        part, place = local_part(embedding)
        if place[0].start == 0 and len(part):
            part[0] += 1  # of a sharded model on one rank alone
        checkpointer.save(9, {}, wait=True)
        last = checkpointer.newest()
        assert last is not None
        assert last.frozen.keys() == frozen - {"model.embed_tokens.weight"}, kind
        for going_on in (config, None):
            with pytest.raises(UserError, match=r"leaves out 21 frozen weights.* model\.norm\.weight"):
                saving(folder, going_on, 1e-9)[1].restore(first)
    assert all(entries == every["ddp"] for entries in every.values())


def saving(folder: Path, config: Any, change: float = 0.0) -> tuple[Accumulator, Checkpointer]:
    model = model_of("llama")
    model.model.norm.weight.data[-1] += change
    accumulator = accumulator_of(model, config)
    return accumulator, Checkpointer(
        folder,
        accumulator.strategy.model,
        accumulator.optimizer,
        strategy=accumulator.strategy,
        config=CheckpointConfig(trainable_only=True),
    )


def check_a_base_is_read_by_parts(world: World) -> None:
    """Built without memory, sharded, and initialised: adapters and base as of a whole model, bit for bit."""
    for kind in ("llama", "gpt2"):
        folder = Path(world.from_main(tempfile.mkdtemp()))
        base: Any = plain_model(kind)
        with world.together():
            if world.is_main:
                base.save_pretrained(folder)

        def build(path: Path = folder) -> nn.Module:
            sizes = {"vocab_size": 320, "max_length": 48}
            module = causal_lm(str(path), **sizes, from_config=True, lora={"rank": 4})  # type: ignore[arg-type]
            return cast(module, torch.float64)

        wanted = built(build)
        load_initial(wanted, str(folder))
        named = {base_name(name): value for name, value in wanted.named_parameters()}
        assert all(torch.equal(value, named[name]) for name, value in base.named_parameters())
        strategy = deferred(build)
        assert differences(strategy, built(build)) == []  # random, as transformers initialises it
        assert differences(strategy, wanted) != []
        load_initial(strategy.module, str(folder))
        assert differences(strategy, wanted) == []
        other = deferred(build, seed=4)
        load_initial(other.module, str(folder))
        assert any(".lora_A." in name for name in differences(other, wanted))
