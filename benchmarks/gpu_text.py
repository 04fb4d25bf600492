"""What does cutting windows by length or packing them save on real text, on one GPU?

    python benchmarks/gpu_text.py

Paragraphs of Python's own documentation (cut at 512 bytes, most far shorter) under a GPT of 12 layers and width 768, in
bfloat16 autocast with fused AdamW and clipping, windows of 256 drawn at random, the same ones each way:

  random      micro-batches of 32 samples, padded to their own longest
  by_length   samples of like length together, as many as make the tokens of the costliest micro-batch of `random`
  flash       by_length without cuDNN's attention, which may plan anew for each shape of a micro-batch; torch prefers
              it on some cards
  measured    by_length, with costs of micro-batches fitted to the first updates, as the trainer does
  packed      samples put end to end, as many as make the same tokens, with attention inside each (torch's varlen_attn)

Seconds per update, micro-steps in it, the share of padding in the tokens that are computed, and real tokens per second;
medians over interleaved rounds, each of an epoch of its own.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import common
import torch
import torch.nn.functional as F
from gpu_model import Scale, adamw, autocast, begin, recorded, wait

from distaccum import Accumulator, LoaderOptions, WindowLoader
from distaccum.data import DocumentationText
from distaccum.data.language.text import IGNORE_INDEX
from distaccum.strategies import SingleStrategy
from distaccum.tasks.model_io import call_model
from distaccum.training.adapt_cuts import CutTuning

MAX_LENGTH = 512
WAYS = ("random", "by_length", "flash", "measured", "packed")
"""How windows are cut."""


@dataclass(frozen=True, slots=True)
class Extent:
    """How much text there is in an update, and how often it is measured."""

    window: int
    micro_batch_size: int
    windows: int
    rounds: int


FULL = Extent(window=256, micro_batch_size=32, windows=6, rounds=3)
QUICK = Extent(window=32, micro_batch_size=8, windows=1, rounds=1)


@dataclass(slots=True)
class Reading:
    """Updates of the same text, cut one way.

    Attributes:
        seconds: per update, of each round.
        micro_steps, computed, real: micro-steps and tokens of the last round, with padding and without.
    """

    loader: WindowLoader[Any]
    model: torch.nn.Module
    accumulator: Accumulator
    tuning: CutTuning | None
    uses_cudnn: bool
    seconds: list[float]
    updates: int = 0
    micro_steps: int = 0
    computed: int = 0
    real: int = 0

    def take(self, extent: Extent, device: torch.device) -> None:
        """Makes the updates of a round."""
        torch.backends.cuda.enable_cudnn_sdp(self.uses_cudnn)
        self.micro_steps = self.computed = 0
        weights = []
        wait(device)
        started = time.perf_counter()
        for window in itertools.islice(self.loader, extent.windows):
            with self.accumulator.window(window) as micro_batches:
                for inputs, targets in micro_batches:
                    self.micro_steps += 1
                    self.computed += targets.numel()
                    with autocast(device):
                        logits = call_model(self.model, inputs).flatten(0, 1).float()
                        loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
                    self.accumulator.backward(loss, weight=(targets != IGNORE_INDEX).sum())
            result = self.accumulator.step()
            weights.append(result.weight)
            self.updates += 1
            if self.tuning is not None:
                self.tuning.after_update(self.updates, window, result)
        wait(device)
        self.seconds.append((time.perf_counter() - started) / extent.windows)
        self.real = round(sum(weights))


def reading(way: str, data: DocumentationText, scale: Scale, extent: Extent, device: torch.device) -> Reading:
    model = scale.model(device)
    loader = WindowLoader(
        data,
        global_batch_size=extent.window,
        micro_batch_size=extent.micro_batch_size,
        lengths=data.lengths if way != "random" else None,
        packed=way == "packed",
        options=LoaderOptions(device=device),
    )
    tuning = CutTuning(loader.cuts, SingleStrategy(model)) if way == "measured" else None
    accumulator = Accumulator(model, adamw(model), clip_norm=1.0, time_micro_steps=tuning is not None)
    return Reading(loader, model, accumulator, tuning, way != "flash", [])


def ways(scale: Scale, extent: Extent, device: torch.device) -> Iterator[common.Row]:
    data = DocumentationText("train", max_length=MAX_LENGTH)
    readings = {way: reading(way, data, scale, extent, device) for way in WAYS}
    for number in common.rounds(extent.rounds + 1, "round"):
        for way in WAYS if number % 2 else WAYS[::-1]:
            readings[way].take(extent, device)
    for found in readings.values():
        del found.seconds[0]  # the first round makes the optimizer's state
    assert len({found.real for found in readings.values()}) == 1, "the same windows"
    for way, found in readings.items():
        seconds = statistics.median(found.seconds)
        yield {
            "windows cut": way,
            "s/update": seconds,
            "micro-steps": found.micro_steps / extent.windows,
            "padding": 1 - found.real / found.computed,
            "real tokens/s": found.real / extent.windows / seconds,
            "tokens/s / random": statistics.median(
                base / own for base, own in zip(readings["random"].seconds, found.seconds, strict=True)
            ),
        }


def main() -> None:
    options, device, scale = begin(common.arguments(__doc__, quick="20 seconds", full="30 seconds"))
    scale = replace(scale, vocab_size=DocumentationText.vocab_size, length=MAX_LENGTH)
    extent = QUICK if options.quick else FULL
    title = f"Windows of {extent.window} paragraphs, {extent.micro_batch_size} in a micro-batch of `random`"
    recorded(__doc__, iter([(title, ways(scale, extent, device))]), write=options.write)


if __name__ == "__main__":
    main()
