"""What does measuring the noise scale cost?

    python benchmarks/noise_scale.py

The same model and windows on this host with `NoiseScale` and without, update by update in turn: seconds of a measured
update and of one that is not measured, and what that makes of an update if they are measured as often as by default.
One rank, two micro-steps at least; two ranks over gloo. Medians.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import common
import torch
from torch import Tensor, nn

from distaccum import Accumulator, NoiseScale
from distaccum.config import DDPConfig
from distaccum.models import CNN, GPT, MLP
from distaccum.runtime.world import joined_world
from distaccum.strategies import SingleStrategy, Strategy, place

EVERY = NoiseScale().every_updates


def _image_batches(steps: int) -> list[Tensor]:
    return [torch.randn(16, 1, 8, 8) for _ in range(steps)]


def _text_batches(steps: int) -> list[Tensor]:
    return [torch.randint(0, 256, (8, 128)) for _ in range(steps)]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], list[Tensor]]]] = {
    "MLP, digits": (lambda: MLP(input_shape=[1, 8, 8], num_classes=10), _image_batches),
    "CNN, digits": (lambda: CNN(input_shape=[1, 8, 8], num_classes=10), _image_batches),
    "GPT, 128 tokens": (lambda: GPT(vocab_size=256, max_length=128), _text_batches),
}


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    output = model(batch)
    return output.float().square().sum()


def measure(strategy: Strategy, batches: list[Tensor], updates: int) -> tuple[float, float]:
    """Returns the median seconds of an update that is not measured, and of one that is; they take turns."""
    # Updates count from 1, and each second one is measured.
    accumulator = Accumulator(
        strategy.model,
        torch.optim.AdamW(strategy.model.parameters(), lr=1e-5, fused=True),
        strategy=strategy,
        noise_scale=NoiseScale(every_updates=2),
        clip_norm=1.0,
    )
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(2 * updates + 4):
        with accumulator.window(batches) as micro_batches:
            for batch in micro_batches:
                accumulator.backward(_loss(strategy.model, batch), len(batch), num_samples=len(batch))
        result = accumulator.step()
        if accumulator.updates > 4:
            seconds[result.noise_scale is not None].append(result.seconds)
    return statistics.median(seconds[False]), statistics.median(seconds[True])


def send_rows(ranks: int, updates: int) -> None:
    for name, (build, make_batches) in MODELS.items():
        for steps in (1, 4) if ranks > 1 else (2, 4):
            common.progress(f"{ranks} ranks, {name}, K = {steps}")
            torch.manual_seed(0)
            module = build()
            strategy = place(module, DDPConfig(), torch.device("cpu")) if ranks > 1 else SingleStrategy(module)
            plain, measured = measure(strategy, make_batches(steps), updates)
            common.send(
                {
                    "ranks": ranks,
                    "model": name,
                    "K": steps,
                    "plain: ms/update": plain * 1e3,
                    "measured: ms/update": measured * 1e3,
                    "measured / plain": measured / plain,
                    f"cost, 1 of {EVERY} measured": f"{(measured / plain - 1) / EVERY:+.2%}",
                }
            )


def on_a_rank(updates: int) -> None:
    torch.set_num_threads(1)
    with joined_world() as world:
        world.init_process_group(torch.device("cpu"))
        send_rows(world.world_size, updates)


def main() -> None:
    if words := common.rank_words():
        on_a_rank(int(words[0]))
        return
    options = common.begin(common.arguments(__doc__, quick="25 seconds", full="2 minutes"))
    updates = "1" if options.quick else "40"
    rows = common.show(
        "What measuring the noise scale costs",
        (row for ranks in (1, 2) for row in common.on_ranks(ranks, __file__, updates)),
    )
    if options.write:
        common.write(__doc__, rows)


if __name__ == "__main__":
    main()
