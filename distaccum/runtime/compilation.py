"""torch.compile of a model: its settings, whether this machine supports them, and the time it takes."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distaccum.errors import UserError


@dataclass(frozen=True, slots=True)
class Compilation:
    """Settings of `torch.compile`. Made by `resolve_compilation`."""

    backend: str
    dynamic: bool | None

    def apply(self, module: nn.Module) -> None:
        """Compiles a module in place, at its first call: its parameters keep their names.

        Not by `module.compile()`, which would compile its hooks too (FSDP's gather parameters), and silently does
        nothing for modules of torch's own classes.
        """
        compiled: Any = torch.compile(module.forward, backend=self.backend, dynamic=self.dynamic)
        module.forward = compiled


def resolve_compilation(backend: str, dynamic: bool | None, device: torch.device) -> Compilation:
    """Checks that there is such a backend, and the compiler that it needs.

    Raises:
        UserError: there is not.
    """
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise UserError(f"compile_backend={backend}: torch has no such backend. Choose one of: {', '.join(known)}.")
    if backend == "inductor" and device.type == "cpu":
        compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
        if shutil.which(compiler) is None:
            raise UserError(
                f"compile=true needs a C++ compiler, and {compiler} is not there. Install it (apt-get install g++), "
                "name another with the environment variable CXX, or set compile=false."
            )
    if backend == "inductor" and device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("compile=true needs triton on a GPU, and it is not installed: pip install triton.")
    return Compilation(backend, dynamic)


class CompileClock:
    """Counts the seconds that are spent compiling inside `counting()`, on this rank."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._taken = 0.0
        self._is_counting = False
        self._started = 0.0
        self._reported = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Registers callbacks for the start and the end of each compilation, forward and backward."""
        from torch._dynamo.callback import callback_handler

        callback_handler.register_start_callback(self._on_start)
        callback_handler.register_end_callback(self._on_end)
        try:
            yield
        finally:
            with suppress(ValueError):  # torch._dynamo.reset() has forgotten them
                callback_handler.remove_start_callback(self._on_start)
                callback_handler.remove_end_callback(self._on_end)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Encloses what is counted: an update, not an evaluation."""
        self._is_counting = True
        try:
            yield
        finally:
            self._is_counting = False

    def has_news(self) -> bool:
        """Whether anything has been compiled since the last call: a flag of the accumulator."""
        before, self._reported = self._reported, self._seconds
        return self._seconds > before

    def take(self) -> float:
        """Seconds of compiling since the last call."""
        taken, self._taken = self._taken, self._seconds
        return self._seconds - taken

    def _on_start(self, _: Any) -> None:
        self._started = time.perf_counter()

    def _on_end(self, _: Any) -> None:
        if self._is_counting:
            self._seconds += time.perf_counter() - self._started
