"""Low-rank adapters in a model, by peft (LoRA; Hu et al. 2022): y = W x + α/r · B (A dropout(x)), W frozen."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distaccum.config.lora import LoraConfig
from distaccum.errors import UserError, require

logger = logging.getLogger(__name__)

ADAPTER = "default"
"""peft's name of an adapter that isn't given one."""


@dataclass(frozen=True, slots=True)
class Adapters:
    """Keeps what a model knows of its adapters, as its attribute `distaccum_adapters`.

    Attributes:
        merge: save the model with the adapters added to its weights, and not the adapters.
        config: peft's configuration of them.
        is_random: the weights that they are for are random.
    """

    merge: bool
    config: Any
    is_random: bool


def add_adapters(module: nn.Module, config: LoraConfig, base: str, *, is_random: bool = False) -> None:
    """Freezes a model and puts adapters into it, in place: A is random, B is zero.

    Args:
        base: where the model's weights come from, for whoever loads the adapters.
        is_random: they come from nowhere.

    Raises:
        UserError: peft is missing or refuses, or what would be merged can't be.
    """
    # It says on machines without GPUs that kernels for them are missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import peft
    except ImportError as error:
        raise UserError('model.lora needs peft, which is missing: pip install "distaccum[hf]".') from error
    alpha = 2 * config.rank if config.alpha is None else config.alpha
    targets = config.targets if isinstance(config.targets, str) else list(config.targets)
    wanted = peft.LoraConfig(
        r=config.rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(Path(base).resolve()) if Path(base).is_dir() else base,
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")  # which peft sets by each layer's class
            peft.inject_adapter_in_model(wanted, module)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"model.lora: peft refuses: {' '.join(str(error).split())[:300]}.") from error
    wanted.inference_mode = True  # for whoever loads them: not to be trained
    found: Any = wanted.target_modules
    wanted.target_modules = found if isinstance(found, str) else sorted(found)
    module.distaccum_adapters = Adapters(config.merge, wanted, is_random)  # type: ignore[assignment]
    layers = layers_with_adapters(module)
    if config.merge:
        _require_mergeable(module, layers)
    trained, total = (
        sum(_count(parameter) for parameter in module.parameters() if parameter.requires_grad or not only)
        for only in (True, False)
    )
    logger.info(
        "model.lora: adapters of rank %d in %d layers, %d of %d parameters (%.2f %%)",
        *(config.rank, len(layers), trained, total, 100 * trained / total),
    )


def _count(parameter: nn.Parameter) -> int:
    """Returns the number of a parameter's numbers, of which a byte of bitsandbytes' holds two."""
    return parameter.numel() * (2 if parameter.dtype is torch.uint8 else 1)


def adapters_of(module: nn.Module) -> Adapters | None:
    """Returns what a model knows of its adapters; None if it has none."""
    return getattr(module, "distaccum_adapters", None)


def is_adapter(name: str) -> bool:
    """Whether a parameter of a model with adapters is one of an adapter, by its name."""
    return ".lora_" in name and f".{ADAPTER}" in name


def base_name(name: str) -> str:
    """Returns the name that a tensor beside adapters has in the model without them."""
    return name.replace(".base_layer.", ".")


def layers_with_adapters(module: nn.Module) -> dict[str, Any]:
    """Returns peft's layers by their names."""
    return {name: part for name, part in module.named_modules() if hasattr(part, "lora_A") and hasattr(part, "scaling")}


def _require_mergeable(module: nn.Module, layers: Mapping[str, Any]) -> None:
    uses: dict[int, int] = {}
    for _, parameter in module.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight
        kind = type(layer.get_base_layer()).__name__
        require(
            ADAPTER in layer.lora_A and weight.ndim == 2 and weight.is_floating_point(),
            f"model.lora.merge=true: the adapter of {name}, a {kind}, can't be added to its weights here. Leave it out "
            "of model.lora.targets, or set model.lora.merge=false and merge with peft.",
        )
        require(
            uses[id(weight)] == 1,
            f"model.lora.merge=true: the weights of {name} are another layer's too, to which the adapter doesn't "
            "belong. Leave it out of model.lora.targets, or set model.lora.merge=false.",
        )
