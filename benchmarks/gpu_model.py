"""What the benchmarks of a GPU share: a GPT of about 124 million parameters, its data and loss, and their options."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from distaccum import Accumulator, TaskOutput
from distaccum.models import GPT

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

Batch = tuple[Tensor, Tensor]


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


GPT2 = Scale(50304, 1024, 12, 12, 768, micro_batch_size=8, accumulation_steps=8, updates=4, rounds=5)
GPT2_QUICK = Scale(50304, 1024, 12, 12, 768, micro_batch_size=8, accumulation_steps=4, updates=3, rounds=2)
SMALL = Scale(64, 32, 2, 2, 32, micro_batch_size=4, accumulation_steps=4, updates=3, rounds=2)


class Tokens(Dataset[Batch]):
    """Random tokens and what follows each."""

    def __init__(self, scale: Scale, samples: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(scale.vocab_size, (samples, scale.length + 1), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Batch:
        return self.tokens[index, :-1], self.tokens[index, 1:]


def batch_of(scale: Scale, size: int, device: torch.device) -> Batch:
    data = Tokens(scale, size)
    inputs, targets = zip(*(data[index] for index in range(size)), strict=True)
    return torch.stack(inputs).to(device), torch.stack(targets).to(device)


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16)


def loss_sum(model: nn.Module, batch: Batch) -> Tensor:
    inputs, targets = batch
    logits = model(inputs)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")


def task(model: nn.Module, batch: Batch) -> TaskOutput:
    """A micro-step's forward, in the format of the context."""
    return TaskOutput(loss_sum(model, batch), batch[1].numel())


def micro_steps(accumulator: Accumulator, model: nn.Module, window: Any, device: torch.device) -> None:
    """Makes a window's micro-steps, without the end of the window."""
    with accumulator.window(window) as micro_batches:
        for batch in micro_batches:
            with autocast(device):
                output = task(model, batch)
            accumulator.backward(output.loss_sum, output.weight)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_tflops(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    fitting = [known for known in PEAK_BF16_TFLOPS if name == known or name.startswith((f"{known} ", f"{known}-"))]
    return float(PEAK_BF16_TFLOPS[max(fitting, key=len)]) if fitting else None


def begin(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, torch.device, Scale]:
    """Parses the command line; returns the options, the device and what is trained there."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = common.begin(parser)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("this benchmark is of a GPU, and torch finds none. --device cpu --quick only shows that it runs.")
    if options.device == "cpu" and (options.write or not options.quick):
        parser.error("figures of a CPU say nothing here: give --device cpu with --quick alone.")
    torch.set_num_threads(1)
    scale = SMALL if options.device == "cpu" else GPT2_QUICK if options.quick else GPT2
    return options, torch.device(options.device), scale


def recorded(description: str | None, tables: Iterator[tuple[str, Iterator[common.Row]]], *, write: bool) -> None:
    """Shows tables one after the other, and writes what there is after each row: a time limit may end the program."""
    found: list[common.Row] = []

    def written(rows: Iterator[common.Row]) -> Iterator[common.Row]:
        for row in rows:
            found.append(row)
            if write:
                common.write(description, found)
            yield row

    for title, table in tables:
        common.show(title, written(table))
