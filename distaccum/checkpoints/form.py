"""The form of a manifest, checked once where it is read: its hash is no signature, anybody can make one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import prod
from typing import Any

FORMAT = 1
SAFETENSORS_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}

Form = dict[Any, Any] | Callable[[Any], bool]
"""`{key: form}` for dictionaries that have at least these keys, `{str: form}` for those with any; else a check of a
value. Where a key is missing, None is checked."""


def misfit(value: Any, form: Form) -> str | None:
    """Returns the place in a value that doesn't have the form, as `.files.a.bytes`; None if there is none."""
    if not isinstance(form, dict):
        return None if form(value) else ""
    if not isinstance(value, dict):
        return ""
    for key in value if str in form else form:
        found = misfit(value.get(key), form[str] if str in form else form[key])
        if found is not None:
            return f".{key}{found}"
    return None


def is_natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def is_number(value: Any) -> bool:
    return type(value) in (int, float)


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) < 64 and all(map(is_natural, value)) and prod(value) < 1 << 53


_TENSOR: dict[Any, Any] = {"dtype": lambda value: is_text(value) and value in SAFETENSORS_NAMES, "shape": _is_shape}
_FROZEN: Form = {**_TENSOR, "fingerprint": is_text}
_CHUNK: Form = {"offsets": _is_shape, "shape": _is_shape, "file": is_text, "key": is_text}


def _is_tensor(value: Any) -> bool:
    """Whether a tensor's chunks cover it, each number once: pieces of one dimension, side by side."""
    chunks = value.get("chunks") if misfit(value, _TENSOR) is None else None
    if not isinstance(chunks, list) or not chunks or any(misfit(chunk, _CHUNK) is not None for chunk in chunks):
        return False
    shape = value["shape"]
    if any(len(chunk["offsets"]) != len(shape) or len(chunk["shape"]) != len(shape) for chunk in chunks):
        return False
    if len({(chunk["file"], chunk["key"]) for chunk in chunks}) < len(chunks):
        return False
    pieces = [list(zip(chunk["offsets"], chunk["shape"], strict=True)) for chunk in chunks]
    cut = {d for piece in pieces for d, part in enumerate(piece) if part != (0, shape[d])}
    if len(cut) != 1:
        return not cut and len(chunks) == 1
    (dimension,) = cut
    ends = sorted((piece[dimension][0], sum(piece[dimension])) for piece in pieces)
    is_gapless = all(end == start for (_, end), (start, _) in pairwise(ends))
    return is_gapless and ends[0][0] == 0 and ends[-1][1] == shape[dimension]


def _is_frozen(value: Any) -> bool:
    return value is None or misfit(value, {str: _FROZEN}) is None


def _is_settings(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_dict, value))


MANIFEST: Form = {
    "format": lambda value: value == FORMAT,
    "update": is_natural,
    "files": {str: {"bytes": is_natural, "blake2b": is_text}},
    "tensors": {str: _is_tensor},
    "state": {
        "progress": is_dict,
        "states": {str: is_dict},
        "optimizer": {"name": is_text, "settings": _is_settings, "settings_at_start": _is_settings},
        "extra": is_dict,
        "world_size": is_natural,
        "frozen": _is_frozen,
        "best": {str: is_number},
        "best_by": lambda value: value is None or (isinstance(value, list) and all(map(is_text, value))),
    },
}


def is_shallow(value: Any, most: int = 100) -> bool:
    """Whether values are nested so little that no recursion over them reaches Python's limit."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return most > 0 and all(is_shallow(entry, most - 1) for entry in inside)
