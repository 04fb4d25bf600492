"""Applies to any model, whatever its class: activation checkpointing, frozen parameters, modes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils.checkpoint import checkpoint

from distaccum.config import instantiate as targets
from distaccum.errors import UserError, listed
from distaccum.runtime.memory import is_out_of_memory
from distaccum.strategies.blocks import blocks_of
from distaccum.training.patterns import parameters_like
from distaccum.training.unfreezing import make_trainable, unfreeze_updates

logger = logging.getLogger(__name__)

_KEYS = ("activation_checkpointing", "freeze", "init_from", "init_on_meta", "unfreeze")


def build_model(section: Any, train_data: Any, wrap: Sequence[str] = ()) -> nn.Module:
    """Builds the model of a section `model`, and applies `freeze` and `activation_checkpointing`.

    What `unfreeze` lists can be trained: `Unfreezing` freezes it, in a run.

    A key that the model's constructor takes itself under the same name is the constructor's.

    Args:
        train_data: the dataset, whose attributes stand in for arguments.
        wrap: class names of the blocks, as in `strategy.wrap`.

    Raises:
        UserError: the section doesn't fit.
    """
    arguments, options = options_of(section)
    module = targets.build(arguments, "model", defaults_from=train_data)
    if not isinstance(module, nn.Module):
        raise UserError(f"model built a {type(module).__name__}, not a torch.nn.Module.")
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise UserError(
                f"model: {name} has no shape before the first forward (nn.Lazy…), and the run lays out memory before "
                "that. Give the layer its sizes, or build the model in a function that calls it once with a sample."
            )
    if patterns := options.get("freeze"):
        if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
            raise UserError(f"model.freeze={patterns!r} must be a list of patterns, as in model.freeze=[embedding.*].")
        freeze(module, patterns)
    if unfrozen := options.get("unfreeze"):
        make_trainable(module, unfreeze_updates(unfrozen), patterns or ())
    for key in ("activation_checkpointing", "init_on_meta"):
        if options.get(key) not in (None, False, True):
            raise UserError(f"model.{key}={options[key]!r} must be true or false.")
    if options.get("activation_checkpointing"):
        checkpoint_blocks(module, wrap)
    return module


def build_model_that_fits(section: Any, train_data: Any, wrap: Sequence[str] = ()) -> nn.Module:
    """Builds a model as `build_model` does.

    Raises:
        UserError: as there, or there is too little memory.
    """
    try:
        return build_model(section, train_data, wrap)
    except (RuntimeError, TypeError, MemoryError) as error:
        if not is_out_of_memory(error) and "overflow" not in str(error).lower():
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"the model is too large to be built: {reason}. Lower the sizes in model or data.") from error


def options_of(section: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a section into the constructor's arguments and the keys that apply to any model."""
    section = targets.arguments_of(section, "model")
    own: Mapping[str, Any] = {}
    if any(section.get(key) for key in _KEYS):
        signature = targets.signature_of(targets.locate(section[targets.TARGET], "model"))
        own = signature.parameters if signature is not None else {}
    options = {key: section[key] for key in _KEYS if key in section and key not in own}
    # What is null, false or empty says nothing, to a constructor neither.
    rest = {key: value for key, value in section.items() if key not in _KEYS or (key in own and value)}
    return rest, options


def reads_weights_again(section: Any) -> bool:
    """Whether the weights of a section `model` come from files, so that a restart has them without a checkpoint.

    That is so of language models of transformers; others may draw some of theirs at random.
    """
    section = targets.arguments_of(section, "model")
    is_loaded = not section.get("from_config") or bool(section.get("init_from"))
    return section[targets.TARGET] == "distaccum.models.causal_lm" and is_loaded


def into_training_mode(module: nn.Module) -> list[str]:
    """Puts a module into training mode, as its own `train()` has it; returns the names of parts that were not in it."""
    names = [name for name, part in module.named_modules() if not part.training]
    module.train()
    names = [name for name in names if module.get_submodule(name).training]
    if names:
        logger.info("built in evaluation mode, but trained (see train.keep_modes): %s", _some_of(names))
    return names


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Puts a module into evaluation mode and each part back into its own: what is frozen by eval() comes back so."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def remarks(module: nn.Module, *, is_cut: bool) -> Iterator[str]:
    """Yields remarks on a model that a user should see before it trains.

    Args:
        is_cut: windows are more than one micro-batch on one rank.
    """
    still = [name for name, part in module.named_modules() if not part.training]
    if tops := [name for name in still if not name or name.rpartition(".")[0] not in still]:
        yield f"trained in evaluation mode, so without dropout and with fixed statistics: {_some_of(tops)}"
    norms = [name for name, part in module.named_modules() if isinstance(part, _BatchNorm) and part.training]
    if norms and is_cut:
        yield (
            f"BatchNorm computes with the statistics of each micro-batch, so updates depend on how windows are cut "
            f"({_some_of(norms)}); python -m distaccum.check measures it and says what helps"
        )


def _some_of(names: Sequence[str]) -> str:
    return listed([name or "the model" for name in names], most=3)


def freeze(module: nn.Module, patterns: Sequence[str]) -> None:
    """Freezes the parameters whose names match a pattern: no gradient, no optimizer state, no part in any sync.

    Args:
        patterns: shell-style (`embedding.*`, `blocks.[01].*`), matched against the names of `named_parameters()`.

    Raises:
        UserError: a pattern matches nothing, or all is frozen.
    """
    for pattern in patterns:
        for parameter in parameters_like(module, pattern, "model.freeze"):
            parameter.requires_grad_(False)
    every = list(module.parameters())
    frozen = [parameter for parameter in every if not parameter.requires_grad]
    if len(frozen) == len(every):
        raise UserError(
            f"model.freeze=[{','.join(patterns)}] freezes all {len(every)} parameters, so there is nothing to train. "
            "Leave some out."
        )
    count, total = (sum(parameter.numel() for parameter in some) for some in (frozen, every))
    logger.info("model.freeze: %d of %d parameters are frozen (%.1f %%)", count, total, 100 * count / total)


def checkpoint_blocks(module: nn.Module, names: Sequence[str] = ()) -> list[nn.Module]:
    """Stores only the inputs of each block, and recomputes the block in the backward (Chen et al. 2016).

    The same bits, random numbers included: less memory for more time. Names in `state_dict()` stay as they are.

    Args:
        names: class names of the blocks. None: the members of each `ModuleList`, or else the module's children.

    Returns:
        The blocks.

    Raises:
        UserError: the module has no blocks, or none of such a name.
    """
    blocks = blocks_of(module, names)
    if not blocks:
        raise UserError(
            f"model.activation_checkpointing=true: {type(module).__name__} has no submodules that could be computed "
            "one by one. Leave it out."
        )
    for block in blocks:
        if "forward" in vars(block):
            raise UserError(
                f"model.activation_checkpointing=true: a {type(block).__name__} of the model has had its forward "
                "replaced, which can't be done twice. Leave one out."
            )
        # A method of the instance: what copies or replicates modules knows how to bind it to the copy.
        block.forward = MethodType(_checkpointed_forward, block)
    return blocks


def take_back_checkpointing(module: nn.Module) -> bool:
    """Undoes `checkpoint_blocks`; returns whether there was anything to undo."""
    blocks = [
        block
        for block in module.modules()
        if getattr(vars(block).get("forward"), "__func__", None) is _checkpointed_forward
    ]
    for block in blocks:
        del block.forward
    return bool(blocks)


def _checkpointed_forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = type(block).forward
    if not torch.is_grad_enabled():
        return forward(block, *args, **kwargs)
    before = {id(buffer): buffer.clone() for buffer in block.buffers()} if block.training else {}
    if not before:
        return checkpoint(forward, block, *args, use_reentrant=False, **kwargs)
    is_first = True

    def compute(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_first
        if is_first:
            is_first = False
            return forward(block, *args, **kwargs)
        # BatchNorm's statistics must not move twice, and what a forward reads must be what it has read then.
        with _buffers_replaced(block, before):
            return forward(block, *args, **kwargs)

    return checkpoint(compute, *args, use_reentrant=False, **kwargs)


@contextmanager
def _buffers_replaced(block: nn.Module, before: Mapping[int, Tensor]) -> Iterator[None]:
    own = [(part, name, buffer) for part in block.modules() for name, buffer in part._buffers.items()]
    copies = {key: tensor.clone() for key, tensor in before.items()}
    for part, name, buffer in own:
        if buffer is not None and id(buffer) in copies:
            part._buffers[name] = copies[id(buffer)]
    try:
        yield
    finally:
        for part, name, buffer in own:
            part._buffers[name] = buffer
