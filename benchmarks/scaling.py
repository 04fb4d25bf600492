"""What grows with the window, ranks, micro-steps, sums, samples and tensors, and by how much?

    python benchmarks/scaling.py

Each quantity is varied alone, in one process: cuts for hundreds of ranks are arithmetic that each rank does for itself.
Medians of several rounds. `ms` is processor time, and for checkpoints what the clock says. `MB` is how far the peak of
the process's memory rises above where it stood; empty where it isn't measured.

  cut by length       a window is cut (batch=by_length), lengths log-normal up to 512, 16 × 512 tokens a micro-batch
  window bounds       an epoch of windows of one sample is laid out, and its last window is looked up
  a plan's start      of a loader over so many samples: its line, the updates of 1,000 epochs, the first and the last
                      window of the last epoch (with K micro-steps)
  lengths in a file   the same start with batch=by_length, lengths in a mapped file, two bytes each; MB is what the
                      process allocates, as pages of the file are the system's
  sums, an update     K micro-steps that report so many numbers each, the same tensor
  checkpoint, save()  until it returns, for a model of so many tensors of 16 numbers with Adam, two more of each
  … the update beside  the one that begins when it returns
  … an update alone   the same without it
  import Accumulator  beyond torch, with compiled bytecode and without
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from distaccum import Accumulator, Checkpointer
from distaccum.loaders import WindowLoader
from distaccum.planning import resolve_batch
from distaccum.planning.by_length import cut_by_length
from distaccum.planning.costs import CostModel
from distaccum.planning.window_sizes import BatchSizes, ConstantSize

_IMPORT = "import torch, time; t = time.process_time(); import distaccum.accumulation; print(time.process_time() - t)"


def peak_megabytes() -> float | None:
    """Returns the peak of this process's memory since `forget_peak`; None where the system doesn't say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM")), None)


def forget_peak() -> None:
    if (refs := Path("/proc/self/clear_refs")).exists():
        refs.write_text("5")


def row(what: str, at: str, seconds: float, megabytes: float | None = None) -> common.Row:
    return {"what": what, "at": at, "ms": round(1e3 * seconds, 3), "MB": megabytes}


def timed(run: Callable[[], object], rounds: int) -> tuple[float, float | None]:
    """Returns the median of seconds, and the megabytes by which memory rises."""
    seconds = []
    forget_peak()
    before = peak_megabytes()
    for _ in range(rounds):
        started = time.process_time()
        run()
        seconds.append(time.process_time() - started)
    after = peak_megabytes()
    return statistics.median(seconds), round(after - before, 1) if before is not None and after is not None else None


def cuts(is_quick: bool) -> Iterator[common.Row]:
    for window in (4096,) if is_quick else (1024, 4096, 16384):
        lengths = np.clip(np.random.default_rng(0).lognormal(4.7, 0.9, window), 1, 512).astype(np.int64)
        for ranks in (8, 256) if is_quick else (8, 64, 256):

            def cut(lengths: np.ndarray = lengths, ranks: int = ranks) -> object:  # type: ignore[type-arg]
                return cut_by_length(lengths, world_size=ranks, max_tokens=8192, costs=CostModel(overhead=128.0))

            yield row("cut by length", f"window {window}, {ranks} ranks", timed(cut, 3 if is_quick else 15)[0])


def bounds(is_quick: bool) -> Iterator[common.Row]:
    for power in (5, 9) if is_quick else (5, 7, 9):

        def lay_out(num_samples: int = 10**power) -> None:
            BatchSizes(ConstantSize(1), num_samples).bounds(0)[-1]
            resolve_batch(world_size=1, global_batch_size=1, micro_batch_size=1).explain(num_samples)

        yield row("window bounds", f"10^{power} samples", *timed(lay_out, 5))


class Counted(Dataset[int]):
    """As many samples as one likes: sample i is i."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


def start(count: int, micro_steps: int, lengths: Any = None) -> None:
    loader = WindowLoader(Counted(count), global_batch_size=1024, micro_batch_size=1024 // micro_steps, lengths=lengths)
    loader.explain()
    loader.sizes.first_number(1000)
    for index in (0, len(loader) - 1):
        next(loader.epoch(999, index)).sample_indices  # noqa: B018


def starts(is_quick: bool) -> Iterator[common.Row]:
    for power in (6, 9) if is_quick else (6, 9, 12):
        for micro_steps in (4, 64):
            at = f"10^{power} samples, K={micro_steps}"
            yield row("a plan's start", at, *timed(partial(start, 10**power, micro_steps), 5))
    for power in (6, 7) if is_quick else (6, 9):
        with tempfile.TemporaryDirectory() as folder:
            lengths = np.memmap(Path(folder) / "lengths", np.uint16, mode="w+", shape=(10**power,))
            for begin in range(0, len(lengths), 10**6):
                lengths[begin : begin + 10**6] = np.random.default_rng(begin).integers(1, 2048, 10**6)
            seconds, _ = timed(partial(start, 10**power, 4, lengths), 3)
            tracemalloc.start()
            start(10**power, 4, lengths)
            allocated = round(tracemalloc.get_traced_memory()[1] / 1e6, 1)
            tracemalloc.stop()
            yield row("lengths in a file", f"10^{power} samples", seconds, allocated)


def sums(is_quick: bool) -> Iterator[common.Row]:
    model = nn.Linear(1, 1)
    accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for power in (5,) if is_quick else (2, 6):
        numbers = torch.ones(10**power)
        for micro_steps in (4, 64):

            def update(counts: torch.Tensor = numbers, micro_steps: int = micro_steps) -> None:
                with accumulator.window(range(micro_steps)) as micro_batches:
                    for _ in micro_batches:
                        accumulator.backward(model(torch.ones(1, 1)).sum(), 1, {"counts": counts})
                accumulator.step()

            update()
            yield row("sums, an update", f"10^{power} numbers, K={micro_steps}", *timed(update, 3 if is_quick else 7))


class Many(nn.Module):
    """A model of many small tensors."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(torch.ones(16)) for _ in range(count)])

    def forward(self, factor: torch.Tensor) -> torch.Tensor:
        return torch.stack(list(self.parts)).sum() * factor


def checkpoints(is_quick: bool) -> Iterator[common.Row]:
    for tensors in (600,) if is_quick else (600, 20_000):
        model = Many(tensors // 3)
        optimizer = torch.optim.Adam(model.parameters(), foreach=True)
        accumulator = Accumulator(model, optimizer)

        def update(model: Many = model, accumulator: Accumulator = accumulator) -> float:
            started = time.perf_counter()
            with accumulator.window([torch.ones(())]) as micro_batches:
                for factor in micro_batches:
                    accumulator.backward(model(factor), 1)
            accumulator.step()
            return time.perf_counter() - started

        update()
        found: list[tuple[float, float, float]] = []
        with tempfile.TemporaryDirectory() as folder:
            checkpointer = Checkpointer(Path(folder), model, optimizer)
            for number in range(2 if is_quick else 4):
                alone = statistics.median(update() for _ in range(3))
                started = time.perf_counter()
                checkpointer.save(number + 1, {})
                saved = time.perf_counter() - started
                found.append((saved, update(), alone))
                checkpointer.wait()
        # The first one makes the memory that the others use again.
        saved, beside, alone = (statistics.median(column) for column in zip(*found[1:], strict=True))
        yield row("checkpoint, save()", f"{tensors} tensors", saved)
        yield row("… the update beside", f"{tensors} tensors", beside)
        yield row("… an update alone", f"{tensors} tensors", alone)


def imports(is_quick: bool) -> Iterator[common.Row]:
    with tempfile.TemporaryDirectory() as folder:
        # Bytecode that isn't there yet is compiled, of this package as of torch, which is imported before.
        ways = {"compiled": [], "not compiled": ["-X", f"pycache_prefix={folder}", "-B"]}
        for way, options in ways.items() if not is_quick else [("compiled", ways["compiled"])]:
            command = [sys.executable, *options, "-c", _IMPORT]
            runs = [
                float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                for _ in range(1 if is_quick else 3)
            ]
            yield row("import Accumulator", way, statistics.median(runs))


def rows(is_quick: bool) -> Iterator[common.Row]:
    for part in (cuts, bounds, starts, sums, checkpoints, imports):
        common.progress(part.__name__)
        yield from part(is_quick)


def main() -> None:
    parser = common.arguments(__doc__, quick="10 seconds", full="1 minute")
    options = common.begin(parser)
    found = common.show("What it takes as one quantity grows", rows(options.quick))
    if options.write:
        common.write(__doc__, found)


if __name__ == "__main__":
    main()
