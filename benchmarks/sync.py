"""What does one sync per update save over one sync per micro-step?

    python benchmarks/sync.py

DDP over gloo on this host, the same model and windows: seconds per update with `no_sync` on all micro-steps but the
last, and without it; rounds of the two interleaved, medians.
"""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from typing import Any

import common
import torch
from torch import nn

from distaccum import Accumulator
from distaccum.config import DDPConfig
from distaccum.runtime.world import joined_world
from distaccum.strategies import DDPStrategy, place

STEPS = (1, 2, 4, 8, 16)
WIDTH = 512


def rounds(accumulator: Accumulator, strategy: Any, steps: int, updates: int) -> dict[str, Any]:
    batches = [torch.randn(4, WIDTH) for _ in range(steps)]
    with_no_sync = DDPStrategy.no_sync
    seconds: dict[str, list[float]] = {"once": [], "every": []}
    traffic: dict[str, tuple[int, int]] = {}
    for update in range(2 * updates + 2):
        kind = ("once", "every")[update % 2]
        DDPStrategy.no_sync = with_no_sync if kind == "once" else lambda self: nullcontext()  # type: ignore[method-assign]
        started = time.perf_counter()
        with accumulator.window(batches) as micro_batches:
            for batch in micro_batches:
                accumulator.backward(strategy.model(batch).square().sum(), len(batch))
        result = accumulator.step()
        if update >= 2:
            seconds[kind].append(time.perf_counter() - started)
            traffic[kind] = result.sync_calls, result.sync_bytes
    DDPStrategy.no_sync = with_no_sync  # type: ignore[method-assign]
    once, every = (statistics.median(seconds[kind]) for kind in ("once", "every"))
    return {
        "K": steps,
        "no_sync: ms/update": once * 1e3,
        "sync every micro-step: ms/update": every * 1e3,
        "ratio": every / once,
        "no_sync: MB/update": traffic["once"][1] / 1e6,
        "every: MB/update": traffic["every"][1] / 1e6,
    }


def on_a_rank(updates: int) -> None:
    torch.set_num_threads(1)
    with joined_world() as world:
        world.init_process_group(torch.device("cpu"))
        torch.manual_seed(0)
        model = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))
        strategy = place(model, DDPConfig(), torch.device("cpu"))
        accumulator = Accumulator(strategy.model, torch.optim.SGD(model.parameters(), lr=1e-4), strategy=strategy)
        for steps in STEPS:
            common.progress(f"K = {steps}")
            common.send({"ranks": world.world_size, **rounds(accumulator, strategy, steps, updates)})


def main() -> None:
    if words := common.rank_words():
        on_a_rank(int(words[0]))
        return
    options = common.begin(common.arguments(__doc__, quick="15 seconds", full="40 seconds"))
    rows = common.show(
        "One sync per update against one per micro-step (8.4 MB of gradients, loopback)",
        common.on_ranks(2, __file__, "2" if options.quick else "20"),
    )
    if options.write:
        common.write(__doc__, rows)


if __name__ == "__main__":
    main()
