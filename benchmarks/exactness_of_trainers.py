"""Whose update is that of the window, whatever it is cut into?

    python benchmarks/exactness_of_trainers.py

`distaccum.testing.assert_same_update` on the loops of trainers, in one process and in two with DDP over gloo: each as
its documentation has it, and where that gives one, by its recipe for samples of unequal lengths. A window of 12
sequences, of which each token counts alike in the loss; 2, 3 and more micro-batches, equal and unequal ones. Plain SGD
without clipping, in float64.

The error is the largest relative difference of a gradient, of the first cut that shows one; the cause is what
`assert_same_update` takes for the likeliest.

Needs the extra: pip install "distaccum[bench]".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.metadata import version
from typing import Any

import common
import torch
import torch.distributed as dist
import torch.nn.functional as F
from peers_contenders import (
    IGNORE_INDEX,
    Sequences,
    TokenClassifier,
    WithLoss,
    mean_loss,
    quieten,
    require_peers,
    transformers_trained,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from distaccum import Accumulator
from distaccum.runtime.world import joined_world
from distaccum.testing import UpdateDiffersError, assert_same_update

VOCABULARY, LONGEST = 32, 16
LENGTHS = (3, 16, 5, 9, 2, 14, 7, 11, 16, 4, 8, 6)
TOLERANCE = 1e-6
Batch = tuple[Tensor, Tensor]
Step = Callable[[nn.Module, torch.optim.Optimizer, list[Batch]], object]


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def tokens(micro_batches: list[Batch]) -> Tensor:
    """Tokens of this rank's micro-batches that count."""
    return torch.stack([(targets != IGNORE_INDEX).sum() for _, targets in micro_batches]).sum()


def tokens_everywhere(micro_batches: list[Batch]) -> Tensor:
    total = tokens(micro_batches)
    if ranks() > 1:
        dist.all_reduce(total)
    return total


def in_ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model) if ranks() > 1 else model


def tutorial(model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: list[Batch]) -> None:
    """The loop of most tutorials."""
    placed = in_ddp(model)
    for number, (inputs, targets) in enumerate(micro_batches, 1):
        with placed.no_sync() if ranks() > 1 and number < len(micro_batches) else nullcontext():  # type: ignore[operator]
            (mean_loss(placed(inputs), targets) / len(micro_batches)).backward()
    optimizer.step()


def distaccum(model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: list[Batch]) -> None:
    placed = in_ddp(model)
    accumulator = Accumulator(placed, optimizer)
    with accumulator.window(micro_batches) as window:
        for inputs, targets in window:
            accumulator.backward(sum_loss(placed(inputs), targets), weight=(targets != IGNORE_INDEX).sum())
    accumulator.step()


def _accelerator(steps: int) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(cpu=True, gradient_accumulation_steps=steps)


def accelerate(model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: list[Batch]) -> None:
    """`accelerator.accumulate`, as its guide to gradient accumulation begins."""
    accelerator = _accelerator(len(micro_batches))
    placed, prepared = accelerator.prepare(model, optimizer)
    for inputs, targets in micro_batches:
        with accelerator.accumulate(placed):
            accelerator.backward(mean_loss(placed(inputs), targets))
            prepared.step()


def accelerate_recipe(model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: list[Batch]) -> None:
    """The same guide's section on variable-size training samples: sums over the count of all ranks, times both."""
    accelerator = _accelerator(len(micro_batches))
    placed, prepared = accelerator.prepare(model, optimizer)
    count = accelerator.gather(tokens(micro_batches)).sum()
    for number, (inputs, targets) in enumerate(micro_batches, 1):
        with nullcontext() if number == len(micro_batches) else accelerator.no_sync(placed):
            loss = sum_loss(placed(inputs), targets) * accelerator.gradient_accumulation_steps
            accelerator.backward(loss * accelerator.num_processes / count)
    prepared.step()


def fabric(model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: list[Batch]) -> None:
    """`fabric.no_backward_sync`, as its guide to gradient accumulation has it."""
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=ranks(), strategy="ddp" if ranks() > 1 else "auto")
    fabric.launch()
    placed, prepared = fabric.setup(model, optimizer)
    for number, (inputs, targets) in enumerate(micro_batches, 1):
        with fabric.no_backward_sync(placed, enabled=number < len(micro_batches)):
            fabric.backward(mean_loss(placed(inputs), targets) / len(micro_batches))
    prepared.step()


def lightning_trainer(model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: list[Batch]) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            inputs, targets = batch
            return mean_loss(self.model(inputs), targets)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer

    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=ranks(),
        strategy="ddp" if ranks() > 1 else "auto",
        max_epochs=1,
        accumulate_grad_batches=len(micro_batches),
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), DataLoader(micro_batches, batch_size=None))  # type: ignore[arg-type]


class MeanLoss(nn.Module):
    """A model with a loss of its own that knows nothing of `num_items_in_batch`, as many have."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": mean_loss(self.model(input_ids), labels)}


def _by_transformers(with_loss: Callable[[nn.Module], nn.Module]) -> Step:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: list[Batch]) -> None:
        # Each rank reads its own micro-batches in their order, one "sample" at a time: ranks take turns.
        gathered: list[Any] = [micro_batches]
        if ranks() > 1:
            gathered = [None] * ranks()
            dist.all_gather_object(gathered, micro_batches)
        dataset = [batch for turn in zip(*gathered, strict=True) for batch in turn]
        transformers_trained(
            with_loss(model),
            optimizer,
            dataset,  # type: ignore[arg-type]
            lambda samples: {"input_ids": samples[0][0], "labels": samples[0][1]},
            classes=_in_order(),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=len(micro_batches),
            max_grad_norm=0.0,
        )

    return step


def _in_order() -> tuple[Any, Any]:
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    return TrainingArguments, InOrder


CONTENDERS: dict[str, tuple[str, str, Step]] = {
    "the tutorials' loop": ("torch", "mean of each micro-batch / K", tutorial),
    "distaccum": ("torch", "Accumulator", distaccum),
    "Accelerate": ("accelerate", "accumulate()", accelerate),
    "Accelerate, recipe": ("accelerate", "variable-size samples", accelerate_recipe),
    "Fabric": ("lightning", "no_backward_sync()", fabric),
    "Lightning Trainer": ("lightning", "accumulate_grad_batches", lightning_trainer),
    "Transformers Trainer": ("transformers", "loss without num_items_in_batch", _by_transformers(MeanLoss)),
    "Transformers Trainer, count": ("transformers", "loss with num_items_in_batch", _by_transformers(WithLoss)),
}
"""Package whose version counts, what it is, and its step."""


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = TokenClassifier(VOCABULARY, width=16, num_layers=2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def verdict(name: str) -> common.Row:
    package, what, step = CONTENDERS[name]
    data = Sequences(LENGTHS, LONGEST, VOCABULARY)
    row = {"ranks": ranks(), "trainer": name, "version": version(package), "its way": what}
    try:
        assert_same_update(build, [data[number] for number in range(len(data))], step, tolerance=TOLERANCE)
    except UpdateDiffersError as failure:
        cause = re.search(r"Likeliest cause: ([^:.]*)", str(failure))
        error = max(map(float, re.findall(r"by ([\d.e+-]+) of its size", str(failure))))
        return row | {"same update": "no", "error": error, "likeliest cause": cause[1] if cause else None}
    return row | {"same update": "yes", "error": None, "likeliest cause": None}


def on_ranks(names: list[str]) -> None:
    quieten()
    torch.set_num_threads(1)
    with joined_world() as world:
        if world.world_size > 1:
            world.init_process_group(torch.device("cpu"))
        for name in names:
            common.progress(name)
            common.send(verdict(name))


def rows(names: list[str]) -> Iterator[common.Row]:
    for count in (1, 2):
        yield from common.on_ranks(count, __file__, *names)


def main() -> None:
    if words := common.rank_words():
        on_ranks(words)
        return
    options = common.begin(common.arguments(__doc__, quick="30 seconds", full="1 minute"))
    require_peers()
    # Importing and setting up the others' trainers is what takes long.
    names = ["the tutorials' loop", "distaccum", "Accelerate, recipe"] if options.quick else list(CONTENDERS)
    found = common.show(f"A window of {len(LENGTHS)} sequences, of which every token counts alike", rows(names))
    if options.write:
        common.write(__doc__, found)


if __name__ == "__main__":
    main()
