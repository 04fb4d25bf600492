"""Does the predicted peak of memory hold?

    python benchmarks/memory.py

Against micro-batch, accumulation steps and placement, on real ranks. The prediction is that of `python -m
distaccum.memory`: measured in one process at smaller micro-batches, with ranks that aren't there, and extrapolated. The
measurement is of real windows on real ranks: on a GPU by CUDA's allocator, on a CPU by the storages that are alive.

Then, what a step of an optimizer takes for itself, beyond parameters, gradients and state: with its implementation left
to `auto`, and with `foreach`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import common
import torch
from torch import nn

from distaccum.config import DDPConfig, DPConfig, FSDPConfig, SingleConfig
from distaccum.config.enums import Accumulate, Implementation, PrecisionName
from distaccum.config.optimizers import (
    AdadeltaConfig,
    AdamConfig,
    AdamW8bitConfig,
    LionConfig,
    NAdamConfig,
    RMSpropConfig,
    SGDConfig,
)
from distaccum.models import GPT
from distaccum.runtime.devices import Precision
from distaccum.runtime.memory import metered
from distaccum.runtime.world import joined_world
from distaccum.tasks import LanguageModeling
from distaccum.tools.memory.lines import PeakLine
from distaccum.tools.memory.measuring import Setting, measure, replicas_of
from distaccum.training.optim import build_optimizer, has_8bit

LENGTH = 64
PLACEMENTS: dict[str, tuple[Any, int]] = {
    "single": (SingleConfig(), 1),
    "dp": (DPConfig(replicas=2), 1),
    "ddp": (DDPConfig(), 2),
    "ddp, no bucket views": (DDPConfig(gradient_as_bucket_view=False), 2),
    "zero-1": (DDPConfig(shard_optimizer=True), 2),
    "zero-1, 8-bit AdamW": (DDPConfig(shard_optimizer=True), 2),
    "ddp, 8-bit AdamW": (DDPConfig(), 2),
    "fsdp": (FSDPConfig(), 2),
    "fsdp, gathered": (FSDPConfig(reshard_in_window=False), 2),
    "fsdp, sharded": (FSDPConfig(accumulate=Accumulate.sharded), 2),
    "fsdp, node of 2": (FSDPConfig(accumulate=Accumulate.node, shard_size=2), 4),
}
if not has_8bit():
    PLACEMENTS = {name: placement for name, placement in PLACEMENTS.items() if "8-bit" not in name}
STEPS = (1, 4)
SIZES = (8, 16, 32)
"""With --quick, the first one alone, and half the layers."""
KNOWN = (2, 4)
"""Samples of the micro-batches that the prediction is made from; of each replica under DP."""
OPTIMIZERS: dict[str, Any] = {
    "nesterov, weight decay": SGDConfig(momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": AdamConfig(_target_="torch.optim.AdamW", weight_decay=0.1),
    "rmsprop": RMSpropConfig(),
    "nadam": NAdamConfig(),
    "adadelta": AdadeltaConfig(),
    "lion": LionConfig(),
}
TENSORS = 24
"""Of 4 MiB each."""


def device() -> torch.device:
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= 2
    return torch.device("cuda", torch.cuda.current_device()) if enough else torch.device("cpu")


def model(layers: int) -> GPT:
    torch.manual_seed(0)
    return GPT(vocab_size=256, max_length=LENGTH, num_layers=layers, num_heads=4, width=96)


def batch_of(samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.zeros(samples, LENGTH, dtype=torch.int64, device=device())
    return tokens, tokens.clone()


def setting(name: str, steps: int) -> Setting:
    strategy, ranks = PLACEMENTS[name]
    return Setting(
        strategy=strategy,
        world_size=ranks,
        accumulation_steps=steps,
        optim=AdamW8bitConfig() if "8-bit" in name else AdamConfig(_target_="torch.optim.AdamW"),
        activation_checkpointing=False,
        device=device(),
        precision=Precision(PrecisionName.fp32, device().type),
    )


def measured(name: str, layers: int, sizes: Sequence[int]) -> dict[str, dict[str, int]]:
    """Measures one placement on the ranks that are here; returns this rank's peaks by micro-steps and micro-batch."""
    found: dict[str, dict[str, int]] = {}
    for steps in STEPS:
        common.progress(f"{name}: {steps} micro-steps measured")
        footprint = measure(model(layers), setting(name, steps), LanguageModeling(), batch_of, sizes, has_ranks=True)
        found[str(steps)] = {str(size): peak for size, peak in footprint.peak.items()}
    return found


def rows(layers: int, sizes: Sequence[int]) -> Iterator[common.Row]:
    """Measures and predicts the peaks, placement by placement."""
    together = {count: common.on_ranks(count, __file__, str(layers), *map(str, sizes)) for count in (2, 4)}
    for name, (strategy, ranks) in PLACEMENTS.items():
        found = measured(name, layers, sizes) if ranks == 1 else next(together[ranks])
        for steps in STEPS:
            common.progress(f"{name}: {steps} micro-steps predicted")
            known = [size * replicas_of(strategy, device()) for size in KNOWN]
            footprint = measure(model(layers), setting(name, steps), LanguageModeling(), batch_of, known)
            for size in sizes:
                peak, predicted = found[str(steps)][str(size)], PeakLine(footprint.peak).at(size)
                yield {
                    "placement": name,
                    "ranks": ranks,
                    "K": steps,
                    "micro-batch": size,
                    "measured MB": peak / 1e6,
                    "predicted MB": predicted / 1e6,
                    "error %": 100 * (predicted - peak) / peak,
                }
    for _ in itertools.chain(*together.values()):
        raise AssertionError("the ranks have measured more placements than were asked for")


def steps() -> Iterator[common.Row]:
    """Measures the temporaries of one step of each optimizer, after the one that has made its state."""
    for name, config in OPTIMIZERS.items():
        for way in (Implementation.auto, Implementation.foreach):
            if not hasattr(config, "implementation") and way is Implementation.foreach:
                continue  # it has one way
            parameters = [nn.Parameter(torch.ones(2**20, device=device())) for _ in range(TENSORS)]
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            chosen = replace(config, implementation=way) if hasattr(config, "implementation") else config
            optimizer = build_optimizer(chosen, parameters, device())
            optimizer.step()
            with metered(device()) as meter:
                optimizer.step()
                taken = meter.lap()
            yield {
                "optimizer": name,
                "implementation": way.name,
                "parameters MB": sum(parameter.nbytes for parameter in parameters) / 1e6,
                "temporaries MB": taken / 1e6,
            }


def on_a_rank(layers: int, sizes: Sequence[int]) -> None:
    with joined_world() as world:
        if device().type == "cuda":
            torch.cuda.set_device(world.local_rank)
        world.init_process_group(device())
        for name, (_, ranks) in PLACEMENTS.items():
            if ranks == world.world_size:
                common.send(measured(name, layers, sizes))


def main() -> None:
    if words := common.rank_words():
        on_a_rank(int(words[0]), [int(size) for size in words[1:]])
        return
    options = common.begin(common.arguments(__doc__, quick="40 seconds", full="2 minutes"))
    torch.set_num_threads(1)  # as on ranks
    table = common.show("Peak memory of rank 0", rows(*((2, SIZES[:1]) if options.quick else (4, SIZES))))
    worst = max(abs(row["error %"]) for row in table)
    print(f"largest error of a prediction from micro-batches of 2 and 4: {worst:.1f} %")
    table += common.show("Temporaries of a step", steps())
    if options.write:
        common.write(__doc__, table)


if __name__ == "__main__":
    main()
