"""Causal language models of transformers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from distaccum.config.lora import LoraConfig, require_four_bit
from distaccum.errors import UserError, listed, require
from distaccum.models import four_bit
from distaccum.models.lora import add_adapters
from distaccum.runtime.torchvision_operators import tolerate_missing_operators

logger = logging.getLogger(__name__)


def causal_lm(
    name_or_path: str,
    *,
    vocab_size: int,
    max_length: int,
    from_config: bool = False,
    attn_implementation: str | None = None,
    gradient_checkpointing: bool = False,
    load_in_4bit: bool = False,
    lora: LoraConfig | Mapping[str, Any] | None = None,
) -> nn.Module:
    """Loads a causal language model of transformers in float32, which the precision may change afterwards.

    Args:
        name_or_path: a folder, or a name on the Hugging Face hub.
        vocab_size: number of the tokenizer's tokens, as the data has it.
        max_length: longest sample, as the data has it.
        from_config: read the configuration alone, and initialise the weights at random.
        attn_implementation: `eager`, `sdpa`, `flex_attention`, …; None for transformers' own choice.
        gradient_checkpointing: the model's own, if it has it.
        load_in_4bit: keep the weights of linear layers in 4 bits, under adapters.
        lora: adapters, which are then trained alone; None or a rank of 0 for none.

    Raises:
        UserError: it can't be loaded, is too small for the data, or 4 bits don't fit to the rest.
    """
    lora = LoraConfig(**lora) if isinstance(lora, Mapping) else lora
    if load_in_4bit:
        require_four_bit(lora, from_config=from_config)
    transformers = _transformers()
    options: dict[str, Any] = {"dtype": torch.float32}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    auto = transformers.AutoModelForCausalLM
    try:
        config = transformers.AutoConfig.from_pretrained(name_or_path)
        _check_size(config, vocab_size, max_length)
        options |= four_bit.loading_options(name_or_path, config, load_in_4bit)
        _check_memory(from_config)
        if from_config:
            with _initialised_without_memory(transformers.modeling_utils):
                module = auto.from_config(config, **options)
        else:
            module, info = auto.from_pretrained(name_or_path, config=config, output_loading_info=True, **options)
            _check_loaded(name_or_path, info)
    except UserError:
        raise
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"model.name_or_path={name_or_path} can't be loaded: {reason}. Give a folder with a causal language model "
            "of transformers, or a name on the Hugging Face hub."
        ) from error
    # Noted here, as sharding changes the class.
    module.config.architectures = [type(module).__name__]
    if gradient_checkpointing:
        _checkpoint_activations(module)
    if lora is not None and lora.rank:
        add_adapters(module, lora, name_or_path, is_random=from_config)
    return four_bit.taken_over(module) if load_in_4bit else module  # type: ignore[no-any-return]


def _transformers() -> Any:
    tolerate_missing_operators()
    try:
        import transformers
    except ImportError as error:
        raise UserError('model=causal_lm needs transformers, which is missing: pip install "distaccum[hf]".') from error
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return transformers


def _check_memory(from_config: bool) -> None:
    require(
        from_config or torch.get_default_device().type != "meta",
        "model.init_on_meta=true builds the model without weights, which are then read by parts: give their folder by "
        "model.init_from, and set model.from_config=true.",
    )


@contextmanager
def _initialised_without_memory(modeling: Any) -> Iterator[None]:
    """Has transformers initialise weights on the meta device too, which it leaves out: a deferred model records it."""
    name = "get_torch_context_manager_or_global_device"
    original = getattr(modeling, name)
    if torch.get_default_device().type == "meta":
        setattr(modeling, name, lambda: None)
    try:
        yield
    finally:
        setattr(modeling, name, original)


def _checkpoint_activations(module: Any) -> None:
    if not module.supports_gradient_checkpointing:
        raise UserError(
            f"model.gradient_checkpointing=true: {type(module).__name__} has none of its own. Set "
            "model.activation_checkpointing=true instead."
        )
    # Renamed by transformers 5.
    enable = getattr(module, "activation_checkpointing_enable", module.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def _check_size(config: Any, vocab_size: int, max_length: int) -> None:
    text = config.get_text_config()
    known = getattr(text, "vocab_size", None)
    if known is not None and vocab_size > known:
        raise UserError(
            f"the tokenizer has {vocab_size} tokens, and the model's vocabulary {known}. Give data.tokenizer the one "
            "that belongs to the model, or resize the model's embeddings once and save it (resize_token_embeddings)."
        )
    longest = getattr(text, "max_position_embeddings", None)
    if longest is not None and max_length > longest:
        raise UserError(
            f"data.max_length={max_length} is more than the {longest} positions that the model has. Set "
            f"data.max_length={longest} or less."
        )


def _check_loaded(name: str, info: dict[str, Any]) -> None:
    """Refuses a checkpoint without some of the model's weights: they would be random.

    Raises:
        UserError: names them.
    """
    absent = [*info["missing_keys"], *(str(entry) for entry in info["mismatched_keys"])]
    if absent:
        raise UserError(
            f"model.name_or_path={name} has no fitting weights for {listed(sorted(absent), 3)}, which would be random. "
            "It may be another kind of model; set model.from_config=true to begin with random weights on purpose."
        )
    if unused := info["unexpected_keys"]:
        logger.warning("%s holds weights that the model doesn't use: %s", name, listed(sorted(unused), 3))
