"""What does distaccum cost on one GPU over a hand-written loop, and what happens when memory runs out?

    python benchmarks/gpu.py

A GPT of about 124 million parameters (12 layers, width 768, 50304 tokens, 1024 places) on random tokens, in bfloat16
autocast with fused AdamW and clipping, compiled and not:

- overhead: seconds per update against a hand-written loop with the same model, optimizer and batches, in turns; how
  often the host waits for the device in micro-steps and in a whole update; tokens per second, and the share of the
  card's peak that they are. An update of N parameters takes 6 N + 12 · layers · width · length operations per token
  (Chowdhery et al. 2022, PaLM, appendix B); what activation checkpointing computes twice would not count. How much of
  the time in which a `WindowLoader` copies batches to the device it computes too, as a profile shows.
- prediction: what `distaccum.memory` says of the peak, against the allocator's.
- auto: the largest micro-batch that is found, how long that takes, and what part of the largest that fits it is.
- recovery: windows whose first micro-batch is too large. Their losses and updates, against those of the same windows
  cut small.

With --device cpu the same code runs at a small size, where running out of memory is injected: for tests.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator
from typing import Any

import common
import torch
from gpu_memory import memory
from gpu_model import (
    Scale,
    Tokens,
    adamw,
    autocast,
    batch_of,
    begin,
    loss_sum,
    micro_steps,
    peak_tflops,
    recorded,
    wait,
)
from gpu_profile import copies_overlapped, host_waits
from torch import nn
from torch.nn.utils import clip_grad_norm_

from distaccum import Accumulator, LoaderOptions, WindowLoader
from distaccum.runtime.memory import free_cached_memory


class Loop:
    """One way to make updates of windows of micro-batches."""

    def __init__(self, name: str, model: nn.Module, device: torch.device) -> None:
        self.name = name
        self.model = model
        self.device = device
        self.optimizer = adamw(model)
        self.accumulator = Accumulator(model, self.optimizer, clip_norm=1.0) if name == "distaccum" else None

    def update(self, batches: Any) -> None:
        if self.accumulator is None:
            self._by_hand(batches)
            return
        micro_steps(self.accumulator, self.model, batches, self.device)
        self.accumulator.step()

    def _by_hand(self, batches: list[Any]) -> None:
        tokens = sum(batch[1].numel() for batch in batches)
        losses = []
        for batch in batches:
            with autocast(self.device):
                loss = loss_sum(self.model, batch) / tokens
            loss.backward()
            losses.append(loss.detach())
        clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch.stack(losses).sum().item()  # a loop that says its loss


def overlapped(loop: Loop, scale: Scale) -> float | str:
    """Returns the share of copies' time with computing beside it, in updates from data on the host."""
    loader = WindowLoader(
        Tokens(scale, 3 * scale.window),
        global_batch_size=scale.window,
        micro_batch_size=scale.micro_batch_size,
        options=LoaderOptions(device=loop.device),
    )
    windows = iter(loader)
    loop.update(next(windows))  # its first batch has nothing to be copied beside

    def others() -> None:
        for window in windows:
            loop.update(window)

    return copies_overlapped(others, loop.device)


def timed(loops: list[Loop], batches: list[Any], scale: Scale, what: str) -> dict[str, list[float]]:
    """Returns seconds per update of each loop, of rounds in which they take turns."""
    taken: dict[str, list[float]] = {loop.name: [] for loop in loops}
    for loop in loops:
        for _ in range(3):
            loop.update(batches)
    for number in common.rounds(scale.rounds, f"{what}: round"):
        for loop in loops if number % 2 == 0 else loops[::-1]:
            wait(loop.device)
            started = time.perf_counter()
            for _ in range(scale.updates):
                loop.update(batches)
            wait(loop.device)
            taken[loop.name].append((time.perf_counter() - started) / scale.updates)
    return taken


def overhead(scale: Scale, device: torch.device, *, compiles: bool, backend: str) -> Iterator[common.Row]:
    """Measures both loops, turn by turn."""
    batches = [batch_of(scale, scale.micro_batch_size, device) for _ in range(scale.accumulation_steps)]
    loops = []
    for name in ("hand-written loop", "distaccum"):
        model = scale.model(device)
        operations = scale.operations_per_token(model)
        if compiles:
            model.compile(backend=backend)
        loops.append(Loop(name, model, device))
    taken = timed(loops, batches, scale, "compiled" if compiles else "not compiled")
    tokens, peak = scale.window * scale.length, peak_tflops(device)
    for loop in loops:
        seconds = statistics.median(taken[loop.name])
        ratio = statistics.median(own / base for own, base in zip(taken[loop.name], taken[loops[0].name], strict=True))
        with host_waits(device) as waits:
            if loop.accumulator is not None:
                micro_steps(loop.accumulator, loop.model, batches, device)
                in_micro_steps = waits()
                loop.accumulator.step()
            else:
                in_micro_steps = None
                loop.update(batches)
            in_update = waits()
        yield {
            "loop": loop.name,
            "compile": str(compiles).lower(),
            "ms/update": seconds * 1e3,
            "/ hand-written": ratio,
            "host waits in micro-steps": in_micro_steps,
            "host waits in an update": in_update,
            "tokens/s": tokens / seconds,
            "share of peak": tokens / seconds * operations / (peak * 1e12) if peak else None,
            "copies beside computing": overlapped(loop, scale) if loop.accumulator is not None else None,
        }


def freed(rows: Iterator[common.Row], device: torch.device) -> Iterator[common.Row]:
    """Frees what a table's measurements have left."""
    yield from rows
    torch.compiler.reset()
    gc.collect()
    free_cached_memory(device)


def tables(scale: Scale, device: torch.device, backend: str) -> Iterator[tuple[str, Iterator[common.Row]]]:
    size = f"{scale.accumulation_steps} micro-steps of {scale.micro_batch_size} × {scale.length} tokens"
    goals = "(goals: 1.01 / hand-written, no wait in micro-steps)"
    yield f"{size} {goals}", freed(overhead(scale, device, compiles=False, backend=backend), device)
    yield "Memory", freed(memory(scale, device), device)
    # Last, as compiling takes longest.
    yield f"Compiled {goals}", overhead(scale, device, compiles=True, backend=backend)


def main() -> None:
    parser = common.arguments(__doc__, quick="1 minute", full="3 minutes")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    options, device, scale = begin(parser)
    recorded(__doc__, tables(scale, device, options.backend), write=options.write)


if __name__ == "__main__":
    main()
