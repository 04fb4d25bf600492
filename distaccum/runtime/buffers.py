"""Buffers of a module: those that are saved with it, and copies to restore them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that are a part of the module's `state_dict()`, each once."""
    seen: set[int] = set()
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                yield f"{prefix}.{name}".lstrip("."), buffer


class KeptBuffers:
    """Copies of all buffers of a module; those that a forward assigns anew (`self.mean = …`) are restored too.

    Args:
        module: None for no buffers.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        self._kept = [
            (part, name, buffer, buffer.clone())
            for part in (module.modules() if module is not None else ())
            for name, buffer in part._buffers.items()
            if buffer is not None
        ]

    def __bool__(self) -> bool:
        return bool(self._kept)

    def put_back(self) -> None:
        """Restores the buffers; may be called again."""
        with torch.no_grad():
            for part, name, buffer, before in self._kept:
                buffer.copy_(before)
                part._buffers[name] = buffer
