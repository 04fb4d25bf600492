"""Copies of a module's buffers, to restore them."""

from __future__ import annotations

import torch
from torch import nn


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
