"""How much slower is training that keeps its newest states in memory?

    python benchmarks/states_in_memory.py

Updates of a model with AdamW in one process, short and long ones: without states in memory, and with
checkpoint.memory_every_updates=10 and 1. Ten updates at a time, in turn; medians.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import checkpoint
import common
import torch

from distaccum.checkpoints import Checkpointer
from distaccum.checkpoints.memory_place import VARIABLE
from distaccum.config import CheckpointConfig

EVERY = (None, 10, 1)
UPDATES = 10


def seconds_per_update(training: checkpoint.Training, checkpointer: Checkpointer, first: int) -> float:
    """Makes ten updates as a run does; returns the seconds of one."""
    started = time.perf_counter()
    for update in range(first, first + UPDATES):
        training.update()
        if checkpointer.is_due(update):
            checkpointer.save(update, {})
    checkpointer.wait_for_memory()
    return (time.perf_counter() - started) / UPDATES


def measured(is_quick: bool) -> Iterator[common.Row]:
    width, layers, rounds = (256, 8, 1) if is_quick else (1024, 16, 3)
    for rows in (8, 64, 512):
        training = checkpoint.Training(width, layers, rows)
        with tempfile.TemporaryDirectory(dir=".") as folder:
            checkpointers = {
                every: Checkpointer(
                    Path(folder, str(every)),
                    training.model,
                    training.optimizer,
                    config=CheckpointConfig(every_minutes=None, memory_every_updates=every),
                )
                for every in EVERY
            }
            found: dict[int | None, list[float]] = {every: [] for every in EVERY}
            for number in common.rounds(rounds + 1, f"{rows} samples an update: round"):
                for every, checkpointer in checkpointers.items():
                    seconds = seconds_per_update(training, checkpointer, 1 + number * UPDATES)
                    if number or is_quick:  # the first round makes the memory that the others use again
                        found[every].append(seconds)
            for checkpointer in checkpointers.values():
                checkpointer.clear_memory()
        plain = statistics.median(found[None])
        megabytes = sum(tensor.nbytes for tensor in training.tensors()) / 1e6
        for every, seconds in found.items():
            median = statistics.median(seconds)
            yield {
                "samples an update": rows,
                "memory_every_updates": "null" if every is None else str(every),
                "s per update": median,
                "more (s)": median - plain,
                "with / without": median / plain,
                "MB": megabytes,
            }


def main() -> None:
    parser = common.arguments(__doc__, quick="10 seconds", full="4 minutes")
    options = common.begin(parser)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=os.environ.get(VARIABLE, "/dev/shm")) as memory:
        os.environ[VARIABLE] = memory
        rows = common.show("Keeping states in memory beside updates", measured(options.quick))
    if options.write:
        common.write(__doc__, rows)


if __name__ == "__main__":
    main()
