"""Writes what a run leaves behind: the whole model, or the adapters of a model that has some."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distaccum.checkpoints import Exported, export_model, load_exported, members_of, remove_export
from distaccum.errors import UserError, listed, require
from distaccum.models.lora import ADAPTER, adapters_of, base_name, is_adapter, layers_with_adapters
from distaccum.runtime.sharded import is_sharded
from distaccum.strategies import Strategy

_ADAPTER_FILE, _ADAPTER_CONFIG = "adapter_model", "adapter_config.json"
_OF_PEFT_MODEL = "base_model.model."
"""What peft's files put before the names of the model inside a `PeftModel`."""


def check_exported(module: nn.Module, initial: str | None) -> None:
    """Refuses a model with adapters of which what is saved at the end would lack something.

    Args:
        initial: `model.init_from`.

    Raises:
        UserError: more than the adapters is trained, or they belong to weights that nobody has.
    """
    adapters = adapters_of(module)
    if adapters is None:
        return
    require(
        adapters.merge or initial is not None or not adapters.is_random,
        "model.lora.rank with model.from_config=true would save adapters of random weights that nobody has. Give a "
        "model with weights, or set model.lora.merge=true, which saves them with the adapters.",
    )
    others = [name for name, part in module.named_parameters() if part.requires_grad and not is_adapter(name)]
    if others and not adapters.merge:
        raise UserError(
            f"model.unfreeze trains {listed(others, 3)}, and a run with model.lora.rank saves the adapters alone. Set "
            "model.lora.merge=true, which saves the whole model."
        )


def load_initial(module: nn.Module, path: str) -> None:
    """Puts the weights of `model.init_from` into a model, beside adapters if it has some (see `load_exported`).

    Raises:
        UserError: as there.
    """
    members = members_of(module)
    if adapters_of(module) is not None:
        members = {base_name(name): tensor for name, tensor in members.items() if not is_adapter(name)}
    load_exported(module, path, "model.init_from", members)


def saved_beside(module: nn.Module, initial: str | None) -> list[Any]:
    """Returns what has files of its own to be saved with the trained weights, if it has `save_pretrained`.

    Args:
        initial: `model.init_from`, which adapters then belong to.
    """
    adapters = adapters_of(module)
    if adapters is not None and not adapters.merge:
        config = copy.copy(adapters.config)
        if initial is not None:
            place = Path(initial).expanduser().resolve()
            config.base_model_name_or_path = str(place if place.is_dir() else place.parent)
        return [config]
    return [getattr(module, name, None) for name in ("config", "generation_config")]


def export_trained(strategy: Strategy, run_dir: Path, *, is_main: bool, suffix: str = "") -> None:
    """Writes `model.safetensors`, or of a model with adapters `adapter_model.safetensors` as peft has it.

    All ranks call it. Adapters that an earlier end of the run has left beside a merged model are removed: whatever
    finds them would load their base in its place.

    Args:
        suffix: put behind the files' names.

    Raises:
        UserError: it can't be written.
    """
    adapters = adapters_of(strategy.module)
    if adapters is None:
        export_model(strategy, run_dir, is_main=is_main, name=f"model{suffix}")
        return
    strategy.at_rest()
    if adapters.merge and is_main:
        remove_export(run_dir, f"{_ADAPTER_FILE}{suffix}")
        (run_dir / _ADAPTER_CONFIG).unlink(missing_ok=True)
    name = "model" if adapters.merge else _ADAPTER_FILE
    tensors = merged_tensors(strategy.module) if adapters.merge else adapter_tensors(strategy.module)
    export_model(strategy, run_dir, is_main=is_main, name=f"{name}{suffix}", tensors=tensors)


def adapter_tensors(module: nn.Module) -> dict[str, Exported]:
    """Returns the adapters of a model by their names in peft's files."""
    return {
        _OF_PEFT_MODEL + name.replace(f".{ADAPTER}", ""): (tensor, None)
        for name, tensor in members_of(module).items()
        if is_adapter(name)
    }


def merged_tensors(module: nn.Module) -> dict[str, Exported]:
    """Returns the tensors of a model, its adapters added to its weights, by their names without adapters."""
    layers = layers_with_adapters(module)
    found: dict[str, Exported] = {}
    for name, tensor in members_of(module).items():
        if not is_adapter(name):
            owner, _, attribute = name.rpartition(".base_layer.")
            finish = partial(_with_adapter, layers[owner]) if owner in layers and attribute == "weight" else None
            found[base_name(name)] = tensor, finish
    return found


@torch.no_grad()
def _with_adapter(layer: Any, weight: Tensor) -> Tensor:
    """Adds α/r · B A to a layer's weight [out, in], or [in, out] for transformers' Conv1D. All ranks call it."""
    a, b = (part[ADAPTER].weight for part in (layer.lora_A, layer.lora_B))
    a, b = (part.full_tensor() if is_sharded(part) else part for part in (a, b))
    kind = torch.promote_types(weight.dtype, torch.float32)
    product = b.to(weight.device, kind) @ a.to(weight.device, kind) * layer.scaling[ADAPTER]
    merged: Tensor = weight.to(kind) + (product.T if layer.fan_in_fan_out else product)
    return merged.to(weight.dtype)
