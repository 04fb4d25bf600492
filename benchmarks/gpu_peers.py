"""How fast is an update of a GPT on one GPU under distaccum and its peers?

    python benchmarks/gpu_peers.py

The GPT of about 124 million parameters of gpu.py, not compiled, in bfloat16 autocast with fused AdamW and clipping at
1, under a hand-written loop, distaccum (Accumulator and WindowLoader), Accelerate, Fabric and Transformers Trainer,
each with its own copies of batches to the device. (Lightning's Trainer refuses to clip for a fused optimizer in mixed
precision.) All in one process, in rounds, each round in another order; a time is the median over rounds of the median
of a block of updates by the device's own clock, a ratio the median of the ratios within the rounds.

Needs the extra: pip install "distaccum[bench]". Peers that are not installed are left out, and it ends with status 1.
"""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import common
import torch
from gpu_model import Scale, adamw, begin, recorded, wait
from peers_contenders import CONTENDERS, Sequences, Training, missing_peers, quieten
from torch import nn

from distaccum.runtime.devices import Stopwatch

HAND_WRITTEN = "hand-written loop"
SKIPPED = 2
"""Updates at the start of a block that don't count."""
NEEDS = {
    HAND_WRITTEN: None,
    "distaccum": None,
    "Accelerate": "accelerate",
    "Fabric": "lightning",
    "Transformers Trainer": "transformers",
}
"""The contenders, and their packages."""


def seconds_per_update(contender: Callable[[Training], None], initial: nn.Module, scale: Scale, updates: int) -> float:
    """Median over a block of updates, after those that don't count."""
    device = next(initial.parameters()).device
    model = copy.deepcopy(initial)
    optimizer = adamw(model)
    stopwatch, ends = Stopwatch(device), list[Any]()
    optimizer.register_step_post_hook(lambda *_: ends.append(stopwatch.mark()))
    samples = scale.window * (SKIPPED + updates)
    contender(
        Training(
            model=model,
            optimizer=optimizer,
            dataset=Sequences([scale.length] * samples, scale.length, scale.vocab_size),
            micro_batch_size=scale.micro_batch_size,
            accumulation_steps=scale.accumulation_steps,
            clip_norm=1.0,
            device=device,
            is_bf16=True,
        )
    )
    assert len(ends) == SKIPPED + updates, f"{len(ends)} updates"
    wait(device)
    return statistics.median(
        stopwatch.seconds(start, end) for start, end in zip(ends[SKIPPED - 1 :], ends[SKIPPED:], strict=False)
    )


def contenders(scale: Scale, device: torch.device, rounds: int, updates: int) -> Iterator[common.Row]:
    missing = missing_peers()
    names = [name for name, package in NEEDS.items() if package not in missing]
    initial = scale.model(device)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in common.rounds(rounds, "round"):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            gc.collect()
            seconds[name].append(seconds_per_update(CONTENDERS[name], initial, scale, updates))
            common.progress(f"{name}: {1e3 * seconds[name][-1]:.1f} ms")
    for name, own in seconds.items():
        yield {
            "contender": name,
            "ms/update": statistics.median(own) * 1e3,
            "/ hand-written": statistics.median(
                mine / base for mine, base in zip(own, seconds[HAND_WRITTEN], strict=True)
            ),
            "tokens/s": scale.window * scale.length / statistics.median(own),
        }


def main() -> None:
    parser = common.arguments(__doc__, quick="40 seconds", full="70 seconds")
    options, device, scale = begin(parser)
    quieten()
    rounds, updates = (1, 1) if options.quick else (3, 4)
    title = f"Updates of {scale.accumulation_steps} micro-steps of {scale.micro_batch_size} × {scale.length} tokens"
    recorded(__doc__, iter([(title, contenders(scale, device, rounds, updates))]), write=options.write)
    if missing := missing_peers():
        raise SystemExit(f'left out, as not installed: {", ".join(missing)} (pip install "distaccum[bench]")')


if __name__ == "__main__":
    main()
