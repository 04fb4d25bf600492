"""Does the predicted peak of memory hold? Against micro-batch, accumulation steps and placement, on real ranks.

The prediction is that of `python -m distaccum.memory`: measured in one process at smaller micro-batches, with ranks
that aren't there, and extrapolated. The measurement is of real windows on real ranks: on a GPU by CUDA's allocator, on
a CPU by the storages that are alive.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from common import arguments, show, torchrun, write

from distaccum.config import DDPConfig, DPConfig, FSDPConfig, SingleConfig
from distaccum.config.components import AdamConfig, AdamW8bitConfig
from distaccum.config.enums import PrecisionName
from distaccum.models import GPT
from distaccum.runtime.devices import Precision
from distaccum.runtime.world import joined_world
from distaccum.tasks import LanguageModeling
from distaccum.tools.memory.lines import PeakLine
from distaccum.tools.memory.measuring import Setting, measure, replicas_of
from distaccum.training.optim import has_8bit

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
}
if not has_8bit():
    PLACEMENTS = {name: placement for name, placement in PLACEMENTS.items() if "8-bit" not in name}
STEPS = (1, 4)
SIZES = (8, 16, 32)
KNOWN = (2, 4)
"""Samples of the micro-batches that the prediction is made from; of each replica under DP."""


def device() -> torch.device:
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= 2
    return torch.device("cuda", torch.cuda.current_device()) if enough else torch.device("cpu")


def model() -> GPT:
    torch.manual_seed(0)
    return GPT(vocab_size=256, max_length=LENGTH, num_layers=4, num_heads=4, width=96)


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
    )


def keywords() -> dict[str, Any]:
    here = device()
    return {"device": here, "precision": Precision(PrecisionName.fp32, here.type)}


def measured(names: list[str], sizes: list[int]) -> dict[str, dict[str, int]]:
    """On the ranks that are here: the peaks of this rank."""
    found: dict[str, dict[str, int]] = {}
    for name in names:
        for steps in STEPS:
            footprint = measure(
                model(), setting(name, steps), LanguageModeling(), batch_of, sizes, has_ranks=True, **keywords()
            )
            found[f"{name}|{steps}"] = {str(size): peak for size, peak in footprint.peak.items()}
    return found


def rows(sizes: list[int]) -> list[dict[str, Any]]:
    """The measured and the predicted peaks, side by side."""
    alone = [name for name, (_, ranks) in PLACEMENTS.items() if ranks == 1]
    together = [name for name, (_, ranks) in PLACEMENTS.items() if ranks > 1]
    found = measured(alone, sizes)
    found |= json.loads(torchrun(2, __file__, "--worker", *map(str, sizes)).splitlines()[-1])
    table = []
    for name, (_, ranks) in PLACEMENTS.items():
        for steps in STEPS:
            known = [size * replicas_of(PLACEMENTS[name][0], device()) for size in KNOWN]
            footprint = measure(model(), setting(name, steps), LanguageModeling(), batch_of, known, **keywords())
            for size in sizes:
                peak, predicted = found[f"{name}|{steps}"][str(size)], PeakLine(footprint.peak).at(size)
                table.append(
                    {
                        "placement": name,
                        "ranks": ranks,
                        "K": steps,
                        "micro-batch": size,
                        "measured MB": peak / 1e6,
                        "predicted MB": predicted / 1e6,
                        "error %": 100 * (predicted - peak) / peak,
                    }
                )
    assert len(together) + len(alone) == len(PLACEMENTS)
    return table


def worker(sizes: list[int]) -> None:
    with joined_world() as world:
        if device().type == "cuda":
            torch.cuda.set_device(world.local_rank)
        world.init_process_group(device())
        found = measured([name for name, (_, ranks) in PLACEMENTS.items() if ranks > 1], sizes)
        if world.is_main:
            print(json.dumps(found))


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker([int(size) for size in sys.argv[2:]])
        return
    options = arguments(__doc__ or "").parse_args()
    table = rows(list(SIZES[-1:] if options.quick else SIZES))
    show("peak memory of rank 0", table)
    worst = max(abs(row["error %"]) for row in table)
    print(f"largest error of a prediction from micro-batches of 2 and 4: {worst:.1f} %")
    if options.write:
        write("memory", "Does the predicted peak of memory hold?", table)


if __name__ == "__main__":
    main()
