"""Memory on one GPU: its prediction, the largest micro-batch that is found, and running out of it."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import common
import torch
from gpu_model import Scale, Tokens, adamw, autocast, batch_of, micro_steps, task, wait
from torch import Tensor, nn

from distaccum import Accumulator, LoaderOptions, Recovery, TaskOutput, WindowLoader
from distaccum.config import SingleConfig
from distaccum.config.enums import PrecisionName
from distaccum.config.optimizers import AdamConfig
from distaccum.runtime.devices import Precision
from distaccum.runtime.memory import free_cached_memory, is_out_of_memory, metered, peak_memory
from distaccum.strategies import SingleStrategy
from distaccum.tools.memory.lines import PeakLine
from distaccum.tools.memory.measuring import Setting, measure
from distaccum.training.auto_micro_batch import Fitting

FITS_ON_A_CPU = 5
"""The largest micro-batch where memory can't run out by itself."""


class OutOfMemoryAbove(nn.Module):
    """A model for which memory "runs out" with more than so many samples: where there is no GPU to fill."""

    def __init__(self, model: nn.Module, most: int) -> None:
        super().__init__()
        self.model = model
        self.most = most

    def forward(self, tokens: Tensor) -> Tensor:
        if len(tokens) > self.most:
            raise torch.OutOfMemoryError("injected")
        output: Tensor = self.model(tokens)
        return output


def _model(scale: Scale, device: torch.device) -> nn.Module:
    model = scale.model(device)
    return model if device.type == "cuda" else OutOfMemoryAbove(model, FITS_ON_A_CPU)


def _forward(model: nn.Module, batch: Any, device: torch.device) -> TaskOutput:
    with autocast(device):
        return task(model, batch)


def _row(part: str, size: int, window: int, *, goal: str, figure: float, what: str, **more: float) -> common.Row:
    row = {"part": part, "micro-batch": size, "of a window of": window, "seconds": None, "peak GB": None} | more
    return row | {"figure": figure, "goal": goal, "what": what}


def _loader(scale: Scale, windows: int, window: int, size: int, device: torch.device) -> WindowLoader[Any]:
    return WindowLoader(
        Tokens(scale, windows * window),
        global_batch_size=window,
        micro_batch_size=size,
        options=LoaderOptions(device=device),
    )


def prediction(scale: Scale, device: torch.device) -> common.Row:
    """What `distaccum.memory` says of an update, from smaller micro-batches, against the peak of a real one."""
    size = scale.micro_batch_size
    setting = Setting(
        strategy=SingleConfig(),
        world_size=1,
        accumulation_steps=scale.accumulation_steps,
        optim=AdamConfig(_target_="torch.optim.AdamW"),
        activation_checkpointing=False,
        device=device,
        precision=Precision(PrecisionName.bf16, device.type),
    )
    master = scale.model(torch.device("cpu"))
    started = time.perf_counter()
    known = [size // 4, size // 2]
    footprint = measure(master, setting, task, lambda samples: batch_of(scale, samples, device), known)
    seconds = time.perf_counter() - started
    predicted = PeakLine(footprint.peak).at(size)
    with metered(device) as meter:
        model = copy.deepcopy(master).to(device)
        accumulator = Accumulator(model, adamw(model), clip_norm=1.0)
        for number, window in enumerate(_loader(scale, 3, scale.window, size, device)):
            if number == 2:  # the first two make the state
                meter.lap()
            micro_steps(accumulator, model, window, device)
            accumulator.step()
        peak = meter.lap()
    return _row(
        "peak predicted",
        size,
        scale.window,
        goal="within 5 %",
        figure=100 * (predicted - peak) / peak,
        what=f"% of error; from micro-batches of {known[0]} and {known[1]}",
        **{"seconds": seconds, "peak GB": peak / 1e9},
    )


@dataclass(slots=True)
class Trials:
    """Real updates of two micro-steps, to see which sizes of them fit."""

    scale: Scale
    device: torch.device
    accumulator: Accumulator
    model: nn.Module

    def fits(self, size: int) -> bool:
        free_cached_memory(self.device)  # else pieces that another size has left are in the way of a larger one
        try:
            for _ in range(2):
                batch = batch_of(self.scale, size, self.device)
                micro_steps(self.accumulator, self.model, [batch, batch], self.device)
                self.accumulator.step()
            wait(self.device)
            return True
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        free_cached_memory(self.device)
        return False


def largest_by_bisection(fits: Callable[[int], bool], near: int) -> int:
    """Returns the largest number for which `fits`, to within 2 %; 0 if there is none.

    Args:
        near: a number that it is probably not far from.
    """
    good, bad = 0, near
    while fits(bad):
        good, bad = bad, bad + max(1, bad // 8)
    if not good:
        good = next((size for size in (near * 7 // 8, near // 2, near // 4, 1) if 0 < size < near and fits(size)), 0)
    while bad - good > max(1, good // 50):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def largest(scale: Scale, device: torch.device, window: int) -> common.Row:
    """What `batch.micro_batch_size=auto` finds, the peak of an update with it, and the largest that fits."""
    model = _model(scale, device)
    optimizer = adamw(model)
    loader = _loader(scale, 1, window, window, device)
    started = time.perf_counter()
    found = Fitting(
        loader, SingleStrategy(model), lambda module, batch: _forward(module, batch, device), optimizer
    ).samples()
    seconds = time.perf_counter() - started
    loader.cuts.set_sizes([found])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    accumulator = Accumulator(model, optimizer, clip_norm=1.0)
    for _ in range(2):
        micro_steps(accumulator, model, next(iter(loader)), device)
        accumulator.step()
    peak, kind = peak_memory(device)
    common.progress("looking for the largest micro-batch that fits, by bisection")
    fitting = largest_by_bisection(Trials(scale, device, accumulator, model).fits, found)
    return _row(
        "micro_batch_size=auto",
        found,
        window,
        goal="0.9 to 1",
        figure=found / fitting,
        what=f"of {fitting}, the largest that fits; {kind}",
        **{"seconds": seconds, "peak GB": peak / 1e9},
    )


def recovery(scale: Scale, device: torch.device, window: int, fits: int, updates: int = 3) -> common.Row:
    """Windows in one micro-batch that is too large, against the same windows cut so that they fit."""
    initial = scale.model(device)
    curves, moved, seconds, smaller = [], [], [], []
    before = torch.cat([p.detach().reshape(-1) for p in initial.parameters()])
    for size in (fits, window):
        model: nn.Module = copy.deepcopy(initial)
        if device.type != "cuda":
            model = OutOfMemoryAbove(model, most=fits)
        accumulator = Accumulator(
            model,
            torch.optim.SGD(model.parameters(), lr=1.0),
            clip_norm=1.0,
            recovery=Recovery(on_smaller=smaller.append),
        )
        loader = _loader(scale, updates, window, size, device)
        wait(device)
        started = time.perf_counter()
        results = [
            accumulator.run(whole, lambda batch, model=model: _forward(model, batch, device))  # type: ignore[misc]
            for whole in loader
        ]
        wait(device)
        seconds.append(time.perf_counter() - started)
        curves.append(torch.tensor([result.loss for result in results], dtype=torch.float64))
        moved.append((torch.cat([p.detach().reshape(-1) for p in model.parameters()]) - before).cpu())
        del model, accumulator, loader
        gc.collect()
        free_cached_memory(device)
    if not smaller:
        raise SystemExit(f"memory did not run out with {window} samples in one micro-batch: nothing was recovered from")
    error = float((moved[1] - moved[0]).norm() / moved[0].norm())
    return _row(
        "out of memory, recovered",
        smaller[-1],
        window,
        goal="< 0.001",
        figure=float(((curves[1] - curves[0]) / curves[0]).abs().max()),
        what=f"difference of {updates} losses; {len(smaller)} times cut smaller; {seconds[1] / seconds[0]:.2f} × the "
        f"time without; error of the updates {error:.1e}",
        seconds=seconds[1],
    )


def memory(scale: Scale, device: torch.device) -> Iterator[common.Row]:
    """Measures all of it, part by part."""
    window = 512 if device.type == "cuda" else 16

    def freed() -> None:
        gc.collect()
        free_cached_memory(device)

    common.progress("predicting the peak")
    yield prediction(scale, device)
    freed()
    common.progress("looking for the largest micro-batch, as auto does")
    found = largest(scale, device, window)
    yield found
    freed()
    common.progress("running out of memory")
    size = found["micro-batch"]
    yield recovery(scale, device, max(window, 2 * size), size)
