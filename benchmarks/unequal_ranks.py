"""What does batch.balance=speed gain when one rank is slower than the others?

    python benchmarks/unequal_ranks.py

Ranks of DDP over gloo, each bound to a core (four ranks share two cores); with some of them busy processes compete,
so that they get a third of what they would have. The same training with equal shares and with shares by measured speed,
in rounds that take turns; medians. The ideal is what the ranks could do without ever waiting for each other: the sum of
their own speeds, each measured without DDP, with its competitors, while the others do the same.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import common
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from distaccum import Accumulator, WindowLoader
from distaccum.config import DDPConfig
from distaccum.runtime.world import joined_world
from distaccum.strategies import SingleStrategy, Strategy, place
from distaccum.training.adapt_cuts import CutTuning

GLOBAL_BATCH, MICRO_BATCH, WIDTH = 768, 8, 256
SLOWDOWN = 3
WARM_UP = 12
"""Updates before measuring: speeds are measured, smoothed and put in force in these."""


@contextmanager
def competitors(core: int, count: int) -> Iterator[None]:
    """Keeps processes busy on one core.

    The rank that they slow starts them, as Linux shares a core out by sessions.
    """
    command = [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"]
    busy = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


class Training:
    """A model that trains on windows of its own, so that two of them can take turns."""

    def __init__(
        self, strategy: Strategy, model: nn.Module, rank: int, world_size: int, tokens: int, balance: bool
    ) -> None:
        inputs = torch.randn(2 * GLOBAL_BATCH, tokens, WIDTH)
        data = TensorDataset(inputs, inputs[..., :10].argmax(-1))
        self.loader = WindowLoader(
            data,
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=MICRO_BATCH,
            rank=rank,
            world_size=world_size,
        )
        self.strategy = strategy
        self.tuning = CutTuning(self.loader.cuts, strategy, balance_speed=balance)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        self.accumulator = Accumulator(
            strategy.model,
            optimizer,
            strategy=strategy,
            reports=self.tuning.reports,
            time_micro_steps=self.tuning.needs_times,
        )
        self.updates = 0

    def epoch(self) -> float:
        """Trains for an epoch; returns its samples per second."""
        started = time.perf_counter()
        for window in self.loader:
            with self.accumulator.window(window) as micro_batches:
                for inputs, labels in micro_batches:
                    logits = self.strategy.model(inputs).flatten(0, 1)
                    loss = F.cross_entropy(logits, labels.flatten(), reduction="sum")
                    self.accumulator.backward(loss, labels.numel())
            self.updates += 1
            self.tuning.after_update(self.updates, window, self.accumulator.step())
        return len(self.loader) * GLOBAL_BATCH / (time.perf_counter() - started)


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def on_a_rank(rounds: int, tokens: int, slowed: int) -> None:
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    rank = int(os.environ["RANK"])
    core = cores[rank % len(cores)]
    os.sched_setaffinity(0, {core})
    is_slowed = rank >= int(os.environ["WORLD_SIZE"]) - slowed
    with competitors(core, SLOWDOWN - 1 if is_slowed else 0), joined_world() as world:
        world.init_process_group(torch.device("cpu"))
        trainings = {}
        for balance in (False, True):
            strategy = place(model(), DDPConfig(), torch.device("cpu"))
            trainings[balance] = Training(strategy, strategy.module, world.rank, world.world_size, tokens, balance)
        for training in trainings.values():
            while training.updates < WARM_UP:
                training.epoch()
        alone_model = model()
        alone = Training(SingleStrategy(alone_model), alone_model, 0, 1, tokens, balance=False)
        found: dict[str, list[float]] = {"even": [], "speed": [], "ideal": []}
        for _ in common.rounds(rounds, f"{world.world_size} ranks, {slowed} slower: round"):
            found["even"].append(trainings[False].epoch())
            found["speed"].append(trainings[True].epoch())
            found["ideal"].append(sum(world.gather(alone.epoch())))
            world.gather(None)
        medians = {name: statistics.median(values) for name, values in found.items()}
        cuts = trainings[True].loader.cuts
        cut = cuts.plan.cut(GLOBAL_BATCH, cuts.shares)
        shares = {
            "even": [GLOBAL_BATCH // world.world_size] * world.world_size,
            "speed": [sum(sizes) for sizes in cut.sizes],
        }
        for name, own in shares.items():
            common.send(
                {
                    "ranks": world.world_size,
                    f"{SLOWDOWN} x slower": slowed,
                    "batch.balance": name,
                    "samples/s": medians[name],
                    "of the ideal": medians[name] / medians["ideal"],
                    "shares": " + ".join(map(str, own)),
                }
            )


def main() -> None:
    if words := common.rank_words():
        on_a_rank(*map(int, words))
        return
    options = common.begin(common.arguments(__doc__, quick="30 seconds", full="3 minutes"))
    worlds = ((2, 1),) if options.quick else ((2, 0), (2, 1), (4, 1), (4, 2))
    words = ("1", "4") if options.quick else ("5", "32")  # rounds, and tokens of a sample
    rows = common.show(
        "Some ranks slowed by competitors for their core",
        (row for ranks, slowed in worlds for row in common.on_ranks(ranks, __file__, *words, str(slowed))),
    )
    if options.write:
        common.write(__doc__, rows)


if __name__ == "__main__":
    main()
