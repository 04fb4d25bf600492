"""The same training under each contender: one epoch over a dataset of token sequences.

Each is written as its own documentation has it, with the options that make it fastest and nothing that it need not do
(no logging, no checkpoints, no progress bar). What an update takes, and what it is, is read off the optimizer by hooks.
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from distaccum import Accumulator, LoaderOptions, WindowLoader
from distaccum.runtime.torchvision_operators import tolerate_missing_operators

tolerate_missing_operators()

IGNORE_INDEX = -100


class TokenClassifier(nn.Module):
    """Classes `[B, T, vocab_size]` of tokens `[B, T]`, each token by itself: padding changes no other place."""

    def __init__(self, vocab_size: int, width: int, num_layers: int) -> None:
        super().__init__()
        layers = [layer for _ in range(num_layers) for layer in (nn.Linear(width, width), nn.ReLU())]
        self.layers = nn.Sequential(nn.Embedding(vocab_size, width), *layers, nn.Linear(width, vocab_size))

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.layers(inputs)
        return logits


def targets_of(inputs: Tensor, vocab_size: int) -> Tensor:
    """The class of each token; none where it is padding, which is 0."""
    return torch.where(inputs == 0, IGNORE_INDEX, inputs * 7 % vocab_size)


class Sequences(Dataset[tuple[Tensor, Tensor]]):
    """Random tokens, padded with 0 to `max_length`. A sample is `(inputs, targets)`."""

    def __init__(self, lengths: Sequence[int], max_length: int, vocab_size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(1, vocab_size, (len(lengths), max_length), generator=generator)
        self.inputs = tokens * (torch.arange(max_length) < torch.tensor(lengths)[:, None])
        self.targets = targets_of(self.inputs, vocab_size)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """What all contenders are given.

    Attributes:
        model: on the device.
        is_bf16: compute in bfloat16 autocast.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    dataset: Sequences
    micro_batch_size: int
    accumulation_steps: int
    clip_norm: float | None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    is_bf16: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def lightning_options(self) -> dict[str, Any]:
        return {
            "accelerator": "cuda" if self.on_gpu else "cpu",
            "devices": self.ranks,
            "precision": "bf16-mixed" if self.is_bf16 else "32-true",
        }

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_bf16)

    @property
    def ranks(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    def loader(self) -> DataLoader[Any]:
        sampler = DistributedSampler(self.dataset) if self.ranks > 1 else None
        return self._loader(shuffle=sampler is None, sampler=sampler)

    def plain_loader(self) -> DataLoader[Any]:
        """For contenders that share it out to the ranks by themselves."""
        return self._loader(shuffle=True)

    def _loader(self, **options: Any) -> DataLoader[Any]:
        return DataLoader(self.dataset, batch_size=self.micro_batch_size, pin_memory=self.on_gpu, **options)


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)


def distaccum(training: Training) -> None:
    model = training.model
    if training.ranks > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    accumulator = Accumulator(model, training.optimizer, clip_norm=training.clip_norm)
    size = training.micro_batch_size
    loader = WindowLoader(
        training.dataset,
        global_batch_size=size * training.accumulation_steps * training.ranks,
        micro_batch_size=size,
        options=LoaderOptions(device=training.device),
    )
    for window in loader:
        with accumulator.window(window) as micro_batches:
            for inputs, targets in micro_batches:
                with training.autocast():
                    logits = model(inputs).flatten(0, 1)
                    loss_sum = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
                accumulator.backward(loss_sum, weight=(targets != IGNORE_INDEX).sum())
        accumulator.step()


def hand_written(training: Training) -> None:
    """The tutorials' loop: each micro-batch's mean, divided by K, and a step at the end of the loader too.

    Not with `static_graph=True`, which fails when the first backward of a run is under `no_sync`.
    """
    model, steps = training.model, training.accumulation_steps
    if training.ranks > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    loader = training.loader()
    for number, batch in enumerate(loader, 1):
        inputs, targets = (tensor.to(training.device, non_blocking=True) for tensor in batch)
        is_last = number % steps == 0 or number == len(loader)
        with model.no_sync() if training.ranks > 1 and not is_last else nullcontext():
            with training.autocast():
                loss = mean_loss(model(inputs), targets) / steps
            loss.backward()
        if is_last:
            if training.clip_norm is not None:
                clip_grad_norm_(model.parameters(), training.clip_norm)
            training.optimizer.step()
            # Zeros in place leave the gradients in DDP's buckets. In one process it makes no difference to the time.
            training.optimizer.zero_grad(set_to_none=False)


def accelerate(training: Training) -> None:
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(
        cpu=not training.on_gpu,
        mixed_precision="bf16" if training.is_bf16 else "no",
        gradient_accumulation_steps=training.accumulation_steps,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    model, optimizer, loader = accelerator.prepare(training.model, training.optimizer, training.plain_loader())
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            accelerator.backward(mean_loss(model(inputs), targets))
            if accelerator.sync_gradients and training.clip_norm is not None:
                accelerator.clip_grad_norm_(model.parameters(), training.clip_norm)
            optimizer.step()
            optimizer.zero_grad()


def fabric(training: Training) -> None:
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    strategy = DDPStrategy(gradient_as_bucket_view=True) if training.ranks > 1 else "auto"
    fabric = Fabric(strategy=strategy, **training.lightning_options)
    fabric.launch()
    model, optimizer = fabric.setup(training.model, training.optimizer)
    loader = fabric.setup_dataloaders(training.plain_loader())
    for number, (inputs, targets) in enumerate(loader, 1):
        # The recipe in its documentation leaves the last window's gradients to the next epoch.
        is_accumulating = number % training.accumulation_steps != 0 and number != len(loader)
        with fabric.no_backward_sync(model, enabled=is_accumulating):
            fabric.backward(mean_loss(model(inputs), targets) / training.accumulation_steps)
        if not is_accumulating:
            if training.clip_norm is not None:
                fabric.clip_gradients(model, optimizer, max_norm=training.clip_norm)
            optimizer.step()
            optimizer.zero_grad()


def lightning_trainer(training: Training) -> None:
    import lightning
    from lightning.pytorch.strategies import DDPStrategy

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = training.model

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            inputs, targets = batch
            return mean_loss(self.model(inputs), targets)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return training.optimizer

    trainer = lightning.Trainer(
        **training.lightning_options,
        strategy=DDPStrategy(gradient_as_bucket_view=True) if training.ranks > 1 else "auto",
        max_epochs=1,
        accumulate_grad_batches=training.accumulation_steps,
        gradient_clip_val=training.clip_norm,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), training.plain_loader())


class WithLoss(nn.Module):
    """A model as Transformers' Trainer calls it: with the count of the window's valid targets, which makes it exact."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        logits = self.model(input_ids).flatten(0, 1)
        count = kwargs["num_items_in_batch"]
        return {"loss": F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum") / count}


def transformers_trained(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: Dataset[Any],
    collate: Callable[[list[Any]], dict[str, Tensor]],
    *,
    classes: tuple[Any, Any] | None = None,
    **options: Any,
) -> None:
    """One epoch under Transformers' Trainer.

    Args:
        model: takes what `collate` makes, and returns a loss.
        classes: of the arguments and the trainer, in place of `TrainingArguments` and `Trainer`.
        options: for the arguments.
    """
    from accelerate.state import AcceleratorState, GradientState
    from transformers import PrinterCallback, Trainer, TrainingArguments
    from transformers.utils.logging import set_verbosity_error

    set_verbosity_error()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with tempfile.TemporaryDirectory() as folder:
        of_arguments, of_trainer = classes or (TrainingArguments, Trainer)
        arguments = of_arguments(
            output_dir=folder,
            use_cpu=next(model.parameters()).device.type == "cpu",
            num_train_epochs=1,
            ddp_find_unused_parameters=False,
            dataloader_pin_memory=next(model.parameters()).device.type == "cuda",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            **options,
        )
        trainer = of_trainer(
            model,
            arguments,
            data_collator=collate,
            train_dataset=dataset,
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        )
        trainer.pop_callback(PrinterCallback)
        trainer.train()


def transformers_trainer(training: Training) -> None:
    def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        inputs, targets = zip(*samples, strict=True)
        return {"input_ids": torch.stack(inputs), "labels": torch.stack(targets)}

    transformers_trained(
        WithLoss(training.model),
        training.optimizer,
        training.dataset,
        collate,
        per_device_train_batch_size=training.micro_batch_size,
        gradient_accumulation_steps=training.accumulation_steps,
        max_grad_norm=training.clip_norm or 0.0,
        bf16=training.is_bf16,
    )


CONTENDERS: dict[str, Callable[[Training], None]] = {
    "hand-written loop": hand_written,
    "distaccum": distaccum,
    "Accelerate": accelerate,
    "Fabric": fabric,
    "Lightning Trainer": lightning_trainer,
    "Transformers Trainer": transformers_trainer,
}
PEERS = ("accelerate", "lightning", "transformers")
"""The packages that the last four need; the extra `bench`."""


def missing_peers(*more: str) -> list[str]:
    """Returns the peers, and more packages, that are not installed."""
    return [name for name in (*PEERS, *more) if importlib.util.find_spec(name) is None]


def require_peers(*more: str) -> None:
    """Ends the program if a peer, or one of more packages, is missing."""
    if missing := missing_peers(*more):
        raise SystemExit(f'{", ".join(missing)} not installed: pip install "distaccum[bench]"')


def quieten() -> None:
    """Silences what the peers say of workers, sessions and devices."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
