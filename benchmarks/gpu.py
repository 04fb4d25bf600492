"""What does distaccum cost on one GPU over a hand-written loop, and what happens when memory runs out?

    python benchmarks/gpu.py

A GPT of about 124 million parameters (12 layers, width 768, 50304 tokens, 1024 places) on random tokens, in bfloat16
autocast with fused AdamW and clipping, compiled and not:

- overhead: seconds per update against a hand-written loop with the same model, optimizer and batches, in turns; how
  often the host waits for the device in micro-steps and in a whole update; tokens per second, and the share of the
  card's peak that they are. An update of N parameters takes 6 N + 12 · layers · width · length operations per token
  (Chowdhery et al. 2022, PaLM, appendix B); what activation checkpointing computes twice would not count.
- auto: the largest micro-batch that is found to fit, how long that takes, and the peak at it.
- recovery: a window whose first micro-batch is too large. Its update, against that of the same window cut small.

With --device cpu the same code runs at a small size, where running out of memory is injected: for tests.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset

from distaccum import Accumulator, LoaderOptions, Recovery, TaskOutput, WindowLoader
from distaccum.models import GPT
from distaccum.runtime.memory import free_cached_memory, peak_memory
from distaccum.strategies import SingleStrategy
from distaccum.training.auto_micro_batch import Fitting

PEAK_BF16_TFLOPS = {
    # Dense bfloat16 on tensor cores, from NVIDIA's data sheets.
    "NVIDIA A100": 312,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H200": 989,
    "NVIDIA L40S": 362,
    "NVIDIA A10G": 70,
    "NVIDIA L4": 121,
}
"""By the beginning of the card's name. Of a card that is not here, no share is said."""


@dataclass(frozen=True, slots=True)
class Scale:
    """What is trained, and how often it is measured."""

    vocab_size: int
    length: int
    num_layers: int
    num_heads: int
    width: int
    micro_batch_size: int
    accumulation_steps: int
    updates: int
    rounds: int

    def model(self, device: torch.device) -> GPT:
        torch.manual_seed(0)
        return GPT(
            vocab_size=self.vocab_size,
            max_length=self.length,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            width=self.width,
        ).to(device)

    @property
    def window(self) -> int:
        return self.micro_batch_size * self.accumulation_steps

    def operations_per_token(self, model: nn.Module) -> float:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return 6 * parameters + 12 * self.num_layers * self.width * self.length


GPT2 = Scale(50304, 1024, 12, 12, 768, micro_batch_size=8, accumulation_steps=8, updates=6, rounds=5)
GPT2_QUICK = Scale(50304, 1024, 12, 12, 768, micro_batch_size=8, accumulation_steps=4, updates=3, rounds=2)
SMALL = Scale(64, 32, 2, 2, 32, micro_batch_size=4, accumulation_steps=4, updates=3, rounds=2)


class Tokens(Dataset[tuple[Tensor, Tensor]]):
    """Random tokens and what follows each."""

    def __init__(self, scale: Scale, samples: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(scale.vocab_size, (samples, scale.length + 1), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.tokens[index, :-1], self.tokens[index, 1:]


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16)


def _loss_sum(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    logits = model(inputs)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Loop:
    """One way to make updates of windows of micro-batches that are on the device already."""

    def __init__(self, name: str, model: nn.Module, device: torch.device) -> None:
        self.name = name
        self.model = model
        self.device = device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        self.accumulator = Accumulator(model, self.optimizer, clip_norm=1.0) if name == "distaccum" else None

    def update(self, batches: list[Any]) -> None:
        if self.accumulator is None:
            self._by_hand(batches)
            return
        with self.accumulator.window(batches) as micro_batches:
            for batch in micro_batches:
                with _autocast(self.device):
                    loss_sum = _loss_sum(self.model, batch)
                self.accumulator.backward(loss_sum, weight=batch[1].numel())
        self.accumulator.step()

    def _by_hand(self, batches: list[Any]) -> None:
        tokens = sum(batch[1].numel() for batch in batches)
        losses = []
        for batch in batches:
            with _autocast(self.device):
                loss = _loss_sum(self.model, batch) / tokens
            loss.backward()
            losses.append(loss.detach())
        clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch.stack(losses).sum().item()  # a loop that says its loss

    def micro_steps(self, batches: list[Any]) -> None:
        """Makes an update without the end of its window; for the accumulator's loop alone."""
        assert self.accumulator is not None
        with self.accumulator.window(batches) as micro_batches:
            for batch in micro_batches:
                with _autocast(self.device):
                    loss_sum = _loss_sum(self.model, batch)
                self.accumulator.backward(loss_sum, weight=batch[1].numel())


class _Waits(TorchDispatchMode):
    """Counts `.item()`, which would make the host wait for a device. (A `.tolist()` is nothing to see on a CPU.)"""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@contextmanager
def host_waits(device: torch.device) -> Iterator[Callable[[], int]]:
    """Counts how often the host waits for the device."""
    if device.type != "cuda":
        with _Waits() as mode:
            yield lambda: mode.count
        return
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: sum("synchronizing CUDA operation" in str(entry.message) for entry in seen)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def peak_tflops(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    fitting = [known for known in PEAK_BF16_TFLOPS if name == known or name.startswith((f"{known} ", f"{known}-"))]
    return float(PEAK_BF16_TFLOPS[max(fitting, key=len)]) if fitting else None


def _batches(scale: Scale, device: torch.device) -> list[Any]:
    data = Tokens(scale, scale.window)
    size = scale.micro_batch_size
    return [
        tuple(torch.stack(part).to(device) for part in zip(*(data[i] for i in range(start, start + size)), strict=True))
        for start in range(0, scale.window, size)
    ]


def overhead(scale: Scale, device: torch.device, *, compiles: bool, backend: str) -> list[common.Row]:
    """Measures both loops, turn by turn."""
    batches = _batches(scale, device)
    loops = []
    for name in ("hand-written loop", "distaccum"):
        model = scale.model(device)
        operations = scale.operations_per_token(model)
        if compiles:
            model.compile(backend=backend)
        loops.append(Loop(name, model, device))
    taken: dict[str, list[float]] = {loop.name: [] for loop in loops}
    for loop in loops:
        for _ in range(3):
            loop.update(batches)
    for number in common.rounds(scale.rounds, f"{'compiled' if compiles else 'not compiled'}: round"):
        for loop in loops if number % 2 == 0 else loops[::-1]:
            _wait(device)
            started = time.perf_counter()
            for _ in range(scale.updates):
                loop.update(batches)
            _wait(device)
            taken[loop.name].append((time.perf_counter() - started) / scale.updates)
    tokens, peak = scale.window * scale.length, peak_tflops(device)
    found = []
    for loop in loops:
        seconds = statistics.median(taken[loop.name])
        ratio = statistics.median(own / base for own, base in zip(taken[loop.name], taken[loops[0].name], strict=True))
        with host_waits(device) as waits:
            if loop.accumulator is not None:
                loop.micro_steps(batches)
                in_micro_steps = waits()
                loop.accumulator.step()
            else:
                in_micro_steps = None
                loop.update(batches)
            in_update = waits()
        found.append(
            {
                "loop": loop.name,
                "compile": str(compiles).lower(),
                "ms/update": seconds * 1e3,
                "/ hand-written": ratio,
                "host waits in micro-steps": in_micro_steps,
                "host waits in an update": in_update,
                "tokens/s": tokens / seconds,
                "share of peak": tokens / seconds * operations / (peak * 1e12) if peak else None,
            }
        )
    return found


class OutOfMemoryAbove(nn.Module):
    """A model for which memory "runs out" with more than so many samples: where there is no GPU to fill."""

    def __init__(self, model: nn.Module, most: int) -> None:
        super().__init__()
        self.model = model
        self.most = most
        self.times = 0

    def forward(self, tokens: Tensor) -> Tensor:
        if len(tokens) > self.most:
            self.times += 1
            raise torch.OutOfMemoryError("injected")
        output: Tensor = self.model(tokens)
        return output


def _task(model: nn.Module, batch: Any, device: torch.device) -> TaskOutput:
    with _autocast(device):
        return TaskOutput(_loss_sum(model, batch), batch[1].numel())


def largest(scale: Scale, device: torch.device, window: int) -> tuple[int, dict[str, Any]]:
    """What `batch.micro_batch_size=auto` finds, and the peak of an update of micro-batches of that size."""
    model: nn.Module = scale.model(device)
    if device.type != "cuda":
        model = OutOfMemoryAbove(model, most=5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    loader = WindowLoader(
        Tokens(scale, window), global_batch_size=window, micro_batch_size=window, options=LoaderOptions(device=device)
    )
    strategy = SingleStrategy(model)
    started = time.perf_counter()
    size = Fitting(loader, strategy, lambda module, batch: _task(module, batch, device), optimizer).samples()
    seconds = time.perf_counter() - started
    loader.cuts.set_sizes([size])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    accumulator = Accumulator(model, optimizer, clip_norm=1.0)
    for update in next(iter(loader)), next(iter(loader)):
        with accumulator.window(update) as micro_batches:
            for batch in micro_batches:
                output = _task(model, batch, device)
                accumulator.backward(output.loss_sum, output.weight)
        accumulator.step()
    peak, kind = peak_memory(device)
    return size, {
        "part": "micro_batch_size=auto",
        "micro-batch": size,
        "of a window of": window,
        "seconds": seconds,
        "peak GB": peak / 1e9,
        "what": f"search, then two updates; {kind}",
    }


def recovery(scale: Scale, device: torch.device, window: int, fits: int) -> dict[str, Any]:
    """A window in one micro-batch that is too large, against the same window cut so that it fits."""
    initial = scale.model(device)
    moved, seconds, smaller = [], [], []
    for size in (fits, window):
        model: nn.Module = copy.deepcopy(initial)
        before = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()
        if device.type != "cuda":
            model = OutOfMemoryAbove(model, most=fits)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        accumulator = Accumulator(model, optimizer, clip_norm=1.0, recovery=Recovery(on_smaller=smaller.append))
        loader = WindowLoader(
            Tokens(scale, window),
            global_batch_size=window,
            micro_batch_size=size,
            options=LoaderOptions(device=device),
        )
        _wait(device)
        started = time.perf_counter()
        for whole in loader:
            accumulator.run(whole, lambda batch, model=model: _task(model, batch, device))  # type: ignore[misc]
        _wait(device)
        seconds.append(time.perf_counter() - started)
        after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        moved.append((after - before).cpu())
        del model, optimizer, accumulator, loader, before, after
        free_cached_memory(device)
    if not smaller:
        raise SystemExit(f"memory did not run out with {window} samples in one micro-batch: nothing was recovered from")
    return {
        "part": "out of memory, recovered",
        "micro-batch": smaller[-1],
        "of a window of": window,
        "seconds": seconds[1],
        "peak GB": None,
        "what": f"{len(smaller)} times cut smaller; {seconds[1] / seconds[0]:.2f} × the time without; error of the "
        f"update {float((moved[1] - moved[0]).norm() / moved[0].norm()):.1e}",
    }


def loops(scale: Scale, device: torch.device, backend: str) -> Iterator[common.Row]:
    for compiles in (False, True):
        yield from overhead(scale, device, compiles=compiles, backend=backend)
        gc.collect()
        free_cached_memory(device)


def memory(scale: Scale, device: torch.device) -> Iterator[common.Row]:
    window = 512 if device.type == "cuda" else 16
    common.progress("looking for the largest micro-batch")
    size, found = largest(scale, device, window)
    yield found
    gc.collect()
    free_cached_memory(device)
    common.progress("running out of memory")
    yield recovery(scale, device, max(window, 2 * size), size)


def main() -> None:
    parser = common.arguments(__doc__, quick="1 minute", full="3 minutes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    options = common.begin(parser)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("this benchmark is of a GPU, and torch finds none. --device cpu --quick only shows that it runs.")
    if options.device == "cpu" and (options.write or not options.quick):
        parser.error("figures of a CPU say nothing here: give --device cpu with --quick alone.")
    device = torch.device(options.device)
    torch.set_num_threads(1)
    scale = SMALL if options.device == "cpu" else GPT2_QUICK if options.quick else GPT2
    title = f"{scale.accumulation_steps} micro-steps of {scale.micro_batch_size} × {scale.length} tokens"
    rows = common.show(title, loops(scale, device, options.backend))
    rows += common.show("Memory", memory(scale, device))
    if options.write:
        common.write(__doc__, rows)


if __name__ == "__main__":
    main()
