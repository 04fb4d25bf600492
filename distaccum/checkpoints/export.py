"""Writes the trained model as one file that needs nothing of this package, and loads weights from such a file."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distaccum.checkpoints.state import check_same_model, persistent_buffers
from distaccum.checkpoints.storage import write_safetensors
from distaccum.errors import UserError
from distaccum.runtime.files import sync
from distaccum.strategies import Strategy

MODEL_FILE = "model.safetensors"


def export_model(strategy: Strategy, run_dir: Path, *, is_main: bool, name: str = "model") -> None:
    """Writes `NAME.safetensors`: the whole model, whatever the strategy, under the names of the user's own module.

    All ranks call it; the main one writes. Tied parameters are in it once, as `safetensors.torch.load_model` expects.

    Raises:
        UserError: it can't be written.
    """
    strategy.at_rest()
    members = [*strategy.module.named_parameters(), *persistent_buffers(strategy.module)]
    tensors = {}
    for key, tensor in members:
        whole: Tensor = tensor.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()  # all ranks take part
        if is_main:
            tensors[key] = whole.cpu()
    if not is_main:
        return
    path, aside = run_dir / f"{name}.safetensors", run_dir / f".{name}.safetensors"
    try:
        aside.unlink(missing_ok=True)
        write_safetensors(aside, tensors)
        aside.rename(path)
        sync(run_dir)
    except (OSError, TypeError) as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)  # it would take up what room there is
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path} can't be written: {reason}. Mend that and start the same command again: it goes on from the last "
            "checkpoint."
        ) from error


def load_exported(module: nn.Module, path: str, key: str) -> None:
    """Puts the weights of a safetensors file, or of a finished run's folder, into a plain module.

    Args:
        key: the configuration key that named the path, for messages.

    Raises:
        UserError: it can't be read, holds another model, or its numbers would be rounded.
    """
    file = Path(path).expanduser()
    try:
        with safe_open(file / MODEL_FILE if file.is_dir() else file, framework="pt") as opened:
            stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{key}={path} can't be read: {error}. Name a safetensors file, or the folder of a finished run."
        ) from error
    shapes = {f"model/{name}": list(value.shape) for name, value in stored.items()}
    check_same_model(module, shapes, f"{key}={path}", "take over what fits of it in a model._target_ of your own")
    with torch.no_grad():
        for name, own in [*module.named_parameters(), *persistent_buffers(module)]:
            if torch.promote_types(stored[name].dtype, own.dtype) != own.dtype:
                raise UserError(
                    f"{key}={path}: {name} is {stored[name].dtype}, which would be rounded to {own.dtype}. Set "
                    "precision so that the model's parameters have its format, or convert the file."
                )
            own.copy_(stored[name])
