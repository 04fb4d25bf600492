"""Loads weights from safetensors files into a model, of each tensor only the part that this rank holds."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from distaccum.checkpoints.form import SAFETENSORS_NAMES
from distaccum.checkpoints.state import check_same_model, members_of
from distaccum.errors import UserError
from distaccum.runtime.sharded import local_part

MODEL_FILE = "model.safetensors"
INDEX_FILE = f"{MODEL_FILE}.index.json"
"""Says in which of several files each tensor is, as Hugging Face's libraries have it."""
_DTYPES: Mapping[str, torch.dtype] = {stored: getattr(torch, name) for name, stored in SAFETENSORS_NAMES.items()}
_MOST_BYTES_OF_INDEX = 1 << 28


@torch.no_grad()
def load_exported(module: nn.Module, path: str, key: str, members: Mapping[str, Tensor] | None = None) -> None:
    """Puts the weights of safetensors files into a module, which may be sharded already.

    No more than one tensor is in memory at a time, and of a sharded one only this rank's part.

    Args:
        path: a safetensors file; an index of several; or a folder with `model.safetensors`, or with an index of that
            name, as a finished run leaves it.
        key: the configuration key that named the path, for messages.
        members: those tensors of the module that are to be filled, by their names in the files. Default: all.

    Raises:
        UserError: it can't be read, holds another model, or its numbers would be rounded.
    """
    members = members_of(module) if members is None else members
    with ExitStack() as stack:
        try:
            stored = _stored(Path(path).expanduser(), stack)
            shapes = {f"model/{name}": list(value.get_shape()) for name, value in stored.items()}
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            raise _unreadable(path, key, error) from error
        check_same_model(members, shapes, f"{key}={path}", "take over what fits of it in a model._target_ of your own")
        for name, own in members.items():
            kind = stored[name].get_dtype()
            if kind not in _DTYPES or torch.promote_types(_DTYPES[kind], own.dtype) != own.dtype:
                raise UserError(
                    f"{key}={path}: {name} is {_DTYPES.get(kind, kind)}, which would be rounded to {own.dtype}. Set "
                    "precision so that the model's parameters have its format, or convert the file."
                )
            part, place = local_part(own)
            try:
                if part.numel():
                    part.copy_(_read(stored[name], place))
            except (OSError, SafetensorError) as error:
                raise _unreadable(path, key, error) from error


def _unreadable(path: str, key: str, error: Exception) -> UserError:
    return UserError(
        f"{key}={path} can't be read: {error}. Name a safetensors file, or the folder of a finished run or of several "
        f"such files with {INDEX_FILE}."
    )


def _read(stored: Any, place: tuple[slice, ...]) -> Tensor:
    found: Tensor = stored[place] if place else stored[...]
    return found


def _stored(path: Path, stack: ExitStack) -> dict[str, Any]:
    """Opens the files of a path; returns what gives slices of each tensor, by name.

    Raises:
        ValueError: the index is none, or names what is not there.
    """
    if path.is_dir():
        has_index = not (path / MODEL_FILE).exists() and (path / INDEX_FILE).exists()
        path = path / (INDEX_FILE if has_index else MODEL_FILE)
    if path.suffix != ".json":
        file = _opened(path, stack)
        return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    places = _places(path)
    files = {}
    for name in sorted(set(places.values())):
        if not (path.parent / name).exists():
            raise ValueError(f"{path.name} names the file {name}, which is not there")
        files[name] = _opened(path.parent / name, stack)
    inside = {name: set(file.keys()) for name, file in files.items()}
    for tensor, name in places.items():
        if tensor not in inside[name]:
            raise ValueError(f"{path.name} says that {tensor} is in {name}, and it is not")
    return {tensor: files[name].get_slice(tensor) for tensor, name in places.items()}


def _opened(path: Path, stack: ExitStack) -> Any:
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
        raise OSError(f"{path.name} is no regular file")
    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except SafetensorError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _places(path: Path) -> dict[str, str]:
    """Reads an index: the name of the file of each tensor. Files lie beside the index."""
    if not path.is_file():
        raise ValueError(f"{path.name} is no regular file")
    if os.stat(path).st_size > _MOST_BYTES_OF_INDEX:
        raise ValueError(f"{path.name} is larger than {_MOST_BYTES_OF_INDEX} bytes")
    found = json.loads(path.read_bytes())
    places = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{path.name} has no weight_map with the name of a file for each tensor")
    for name in places.values():
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise ValueError(f"{path.name} names {name!r}, which is not a file beside it")
    return places
