"""Checks of adapters over 4-bit weights on real ranks: the same update for any cut. Float64, to 1e-12."""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any

import tiny_language_model
import torch
from checks_language import ALONE, CONFIGS, UPDATES, chats
from checks_lora import trained
from examples import distance, flat
from torch import Tensor, nn

from distaccum import WindowLoader
from distaccum.config.lora import LoraConfig
from distaccum.models import causal_lm
from distaccum.models.lora import add_adapters, is_adapter
from distaccum.runtime.world import World
from distaccum.tasks import CausalLM

NAMES = ["c_attn", "c_proj"]


@functools.cache
def loaded(world: World) -> tuple[Any, nn.Module]:
    """A model whose weights are stored transposed, with rows that end within a block; in 4 bits with adapters, and as
    it is."""
    import transformers

    with tempfile.TemporaryDirectory() as own:
        if world.is_main:
            tiny_language_model.write_model(Path(own), "gpt2")
        folder = world.from_main(own)
        torch.manual_seed(1)
        lora = {"rank": 4, "alpha": 5.0, "targets": NAMES}
        model: Any = causal_lm(folder, vocab_size=320, max_length=48, load_in_4bit=True, lora=lora)
        plain: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        world.gather(None)  # until then the folder is read
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    return model.double().train(), plain.train()


def model_of(world: World, checkpointing: bool = False) -> Any:
    model = copy.deepcopy(loaded(world)[0])
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def weight_by_hand(layer: Any) -> Tensor:
    """Number by number, as QLoRA's paper has it: a code of the block's scale, which is a code of a scale too."""
    from bitsandbytes.functional import get_4bit_type

    numbers = layer.scales_of_scales.view(torch.float32)
    scales = [float(numbers[byte]) * float(numbers[256 + n // 256]) for n, byte in enumerate(layer.scales.tolist())]
    codes = get_4bit_type("nf4", device="cpu").tolist()
    found = [code for byte in layer.weight.flatten().tolist() for code in (codes[byte >> 4], codes[byte & 15])]
    weights = [code * (scales[n // 64] + float(numbers[-1])) for n, code in enumerate(found)]
    return torch.tensor(weights, dtype=torch.float64).view(layer.out_features, layer.in_features)


@functools.cache
def by_hand(world: World) -> Tensor:
    """The same updates by plain torch: whole windows, each layer's weight with its adapter multiplied out."""
    model = model_of(world)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.5, momentum=0.9)
    plain = loaded(world)[1]
    layers = {name.replace(".base_layer", ""): part for name, part in model.named_modules() if hasattr(part, "scales")}
    frozen = {name: layer.multiplied_out(torch.float64) for name, layer in layers.items()}
    for name, weight in frozen.items():
        assert distance(weight, weight_by_hand(layers[name])) < 1e-6, name  # float32
    loader, updates = WindowLoader(chats(), global_batch_size=12, micro_batch_size=12, seed=1, **ALONE), 0
    while updates < UPDATES:
        for (batch,) in loader:
            weights = {f"{name}.weight": weight.T for name, weight in frozen.items()}
            for name, part in model.named_modules():
                if hasattr(part, "lora_A"):
                    a, b = (adapter["default"].weight for adapter in (part.lora_A, part.lora_B))
                    weights[f"{name}.weight"] = (frozen[name] + 5 / 4 * (b @ a)).T
            logits = torch.func.functional_call(plain, weights, (), {**batch, "use_cache": False}).logits
            targets = batch["labels"][:, 1:]
            loss_sum = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="sum")
            (loss_sum / (targets != -100).sum()).backward()
            nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            updates += 1
    return adapters(model)


def adapters(model: Any) -> Tensor:
    parts = [whole(part) for name, part in model.named_parameters() if is_adapter(name)]
    return torch.cat([part.flatten() for part in parts])


def whole(tensor: Any) -> Tensor:
    found: Tensor = tensor.detach()
    return found.full_tensor() if hasattr(found, "full_tensor") else found


def check_every_cut_makes_the_update_of_one_shot(world: World) -> None:
    wanted = by_hand(world)
    assert distance(wanted, adapters(model_of(world))) > 1e-3
    for name, config in {"single": None, **CONFIGS}.items():
        for checkpointing in (False, True) if name in ("ddp", "fsdp") else (False,):
            here = world if config is not None else None
            strategy = trained(model_of(world, checkpointing), config, here, micro_batch_size=2)
            assert distance(adapters(strategy.module), wanted) < 1e-12, (name, checkpointing)


def check_whole_weights_and_a_mean_of_micro_batches_miss_it(world: World) -> None:
    class OfMicroBatch(CausalLM):
        def __call__(self, model: nn.Module, batch: Any) -> Any:
            output = super().__call__(model, batch)
            output.loss_sum, output.weight = output.loss_sum / output.weight, 1
            return output

    found = trained(model_of(world), CONFIGS["ddp"], world, OfMicroBatch(), micro_batch_size=2)
    assert distance(adapters(found.module), by_hand(world)) > 1e-4
    unquantised = copy.deepcopy(loaded(world)[1])
    add_adapters(unquantised, LoraConfig(rank=4, alpha=5.0, targets=NAMES), "base")
    unquantised.load_state_dict(
        {key: value for key, value in model_of(world).state_dict().items() if is_adapter(key)}, strict=False
    )
    unquantised.double()
    found = trained(unquantised, CONFIGS["ddp"], world, micro_batch_size=2)
    assert distance(adapters(found.module), by_hand(world)) > 1e-4


def check_adapters_alone_cross_the_network(world: World) -> None:
    size = sum(part.nbytes for name, part in model_of(world).named_parameters() if is_adapter(name))
    for name in ("ddp", "fsdp"):
        strategy = trained(model_of(world), CONFIGS[name], world, micro_batch_size=2)
        # DDP sends a few numbers of the window with them.
        assert UPDATES * size <= strategy.traffic.bytes < UPDATES * size * 1.1, (name, strategy.traffic.bytes, size)


def check_ranks_take_the_weights_of_the_first(world: World) -> None:
    """Scales too, which bitsandbytes keeps outside of the parameters."""
    model = model_of(world)
    if world.rank:
        for part in model.modules():
            if hasattr(part, "scales"):
                part.scales.fill_(1)
                part.scales_of_scales.fill_(1)
    found, wanted = (trained(each, CONFIGS["ddp"], world, micro_batch_size=2) for each in (model, model_of(world)))
    assert distance(flat(found.module), flat(wanted.module)) == 0
