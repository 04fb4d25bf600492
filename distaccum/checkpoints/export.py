"""Writes the trained model as safetensors files that need nothing of this package."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from distaccum.checkpoints.state import members_of
from distaccum.checkpoints.storage import write_safetensors
from distaccum.errors import UserError
from distaccum.runtime.files import sync
from distaccum.runtime.sharded import is_sharded
from distaccum.strategies import Strategy

MOST_BYTES_OF_FILE = 5 * 10**9
"""What Hugging Face's libraries put into one file."""


Exported = tuple[Tensor, Callable[[Tensor], Tensor] | None]
"""A tensor to save, and what is made of the whole of it first, of the same shape and format; all ranks call that."""


def export_model(
    strategy: Strategy,
    run_dir: Path,
    *,
    is_main: bool,
    name: str = "model",
    most_bytes: int = MOST_BYTES_OF_FILE,
    tensors: Mapping[str, Exported] | None = None,
) -> None:
    """Writes the whole model, whatever the strategy, under the names of the user's own module.

    That is `NAME.safetensors`; or if it would be larger than `most_bytes`, `NAME-00001-of-000NN.safetensors` and
    `NAME.safetensors.index.json`, which says in which file each tensor is. Files of an earlier export of this name are
    replaced, and there is no index at any time of which a file is missing.

    All ranks call it; the main one writes, tensor by tensor. Tied parameters are in it once, as
    `safetensors.torch.load_model` expects.

    Args:
        tensors: what to write in place of all that the model has, by name.

    Raises:
        UserError: it can't be written.
    """
    strategy.at_rest()
    if tensors is None:
        tensors = {key: (tensor, None) for key, tensor in members_of(strategy.module).items()}
    gathering = _Gathering(tensors)
    if not is_main:
        gathering.finish()
        return
    try:
        _remove(run_dir, f".{name}")
        _write(run_dir, name, {key: tensor for key, (tensor, _) in tensors.items()}, most_bytes, gathering)
    except (OSError, TypeError) as error:
        with suppress(OSError):
            _remove(run_dir, f".{name}")  # it would take up what room there is
        gathering.finish()  # which the other ranks wait for
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{run_dir / name}.safetensors can't be written: {reason}. Mend that and start the same command again: it "
            "goes on from the last checkpoint."
        ) from error


class _Gathering:
    """Gathers sharded tensors, one at a time and in the same order on all ranks."""

    def __init__(self, tensors: Mapping[str, Exported]) -> None:
        self._left = deque(tensors.values())

    def __call__(self, tensor: Tensor) -> Tensor:
        own, finish = self._left.popleft()
        assert tensor is own
        whole = tensor.full_tensor() if is_sharded(tensor) else tensor
        return whole if finish is None else finish(whole)

    def finish(self) -> None:
        """Takes part in what is left."""
        while self._left:
            self(self._left[0][0])


def remove_export(folder: Path, name: str) -> None:
    """Removes the files of an earlier export of a name, if there are any."""
    _remove(folder, name)


def _write(folder: Path, name: str, tensors: Mapping[str, Tensor], most_bytes: int, gathering: _Gathering) -> None:
    parts = _parts(tensors, most_bytes)
    single, index = f"{name}.safetensors", f"{name}.safetensors.index.json"
    files = {single: parts[0]}
    if len(parts) > 1:
        files = {f"{name}-{n:05}-of-{len(parts):05}.safetensors": part for n, part in enumerate(parts, 1)}
    for file, part in files.items():
        write_safetensors(folder / f".{file}", part, gathering)
    if len(parts) == 1:
        (folder / f".{single}").rename(folder / single)
        sync(folder)
        _remove(folder, name, besides=single)
        return
    places = {key: file for file, part in files.items() for key in part}
    size = sum(tensor.nbytes for tensor in tensors.values())
    content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    (folder / f".{index}").write_text(json.dumps(content, indent=2) + "\n")
    sync(folder / f".{index}")
    # The old index goes first and the new one comes last: files of two exports never look like a whole one.
    _remove(folder, name)
    for file in files:
        (folder / f".{file}").rename(folder / file)
    sync(folder)
    (folder / f".{index}").rename(folder / index)
    sync(folder)


def _parts(tensors: Mapping[str, Tensor], most_bytes: int) -> list[dict[str, Tensor]]:
    """Cuts tensors, in their order, into parts of at most so many bytes, or of a single larger tensor."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if parts[-1] and size + tensor.nbytes > most_bytes:
            parts.append({})
            size = 0
        parts[-1][key] = tensor
        size += tensor.nbytes
    return parts


def _remove(folder: Path, name: str, besides: str = "") -> None:
    """Removes the files of an export, the index first."""
    pattern = re.compile(rf"{re.escape(name)}(\.safetensors\.index\.json|(-\d{{5}}-of-\d{{5}})?\.safetensors)")
    found = [path for path in folder.iterdir() if pattern.fullmatch(path.name) and path.name != besides]
    for path in sorted(found, key=lambda path: path.suffix != ".json"):
        path.unlink(missing_ok=True)
        if path.suffix == ".json":
            sync(folder)
