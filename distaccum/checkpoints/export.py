"""The trained model as one file that needs nothing of this package."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from torch import Tensor
from torch.distributed.tensor import DTensor

from distaccum.checkpoints.state import persistent_buffers
from distaccum.checkpoints.storage import write_safetensors
from distaccum.errors import UserError
from distaccum.files import sync
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
