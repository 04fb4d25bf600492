"""Recognises trainers of Transformers, TRL and Lightning, and makes one update of a given window with them."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from distaccum.testing.recording import NotProvableError
from distaccum.testing.same_update import Loop, assert_same

_FORMS = (
    "a transformers.Trainer (TRL's too), a tuple of a lightning.Trainer and what its fit() takes, or a "
    "distaccum.testing.Loop"
)
_LIGHTNING = ("lightning.pytorch", "pytorch_lightning")


def assert_same_trainer(
    make_trainer: Callable[[], Any], samples: int = 12, *, uneven: bool = True, tolerance: float = 1e-6, seed: int = 0
) -> None:
    """Fails unless a trainer makes the same update of a window for every cut into micro-batches and ranks.

    Args:
        make_trainer, samples: as for `loop_of`.
        uneven, tolerance, seed: as for `assert_same_update`.

    Raises:
        UpdateDiffersError: an AssertionError that names the tensors and the likeliest cause.
        ValueError: `make_trainer` returns something else, or what is not supported.
    """
    loop = loop_of(make_trainer, samples)
    assert_same(replace(loop, uneven=loop.uneven and uneven), tolerance=tolerance, seed=seed)


def loop_of(make_trainer: Callable[[], Any], samples: int = 12) -> Loop:
    """Returns the loop of a trainer, for `distaccum.check --trainer` and `assert_same_trainer`.

    One update is the trainer's own `train()` or `fit()`, with as many micro-steps as the cut has. Its micro-batches are
    made by the trainer's own collate function of the first samples of its own dataset. It is neither evaluated nor
    saved, and callbacks that come with its package don't run.

    Args:
        make_trainer: returns a new trainer at each call, with the same initial weights: a `transformers.Trainer` (or
            TRL's `SFTTrainer`), a tuple of a `lightning.Trainer` and what its `fit` takes (the module, and the loader
            or datamodule unless the module has one), or a `Loop`.
        samples: of the window; a `Loop` has its own.

    Raises:
        NotProvableError: it returns something else, or what can't be driven.
    """
    made = make_trainer()
    if isinstance(made, Loop):
        return made
    trainer = made[0] if isinstance(made, tuple) and made else made
    if _is_a(trainer, "transformers.trainer", "Trainer"):
        return _of_transformers(make_trainer, made, samples)
    if any(_is_a(trainer, package, "Trainer") for package in _LIGHTNING):
        return _of_lightning(make_trainer, made, samples)
    raise NotProvableError(f"make_trainer must return {_FORMS}, and has returned {made!r:.200}.")


def _is_a(value: object, module: str, name: str) -> bool:
    """Returns whether this is an instance of a class, whose module has been imported if it is."""
    found = getattr(sys.modules.get(module), name, None)
    return found is not None and isinstance(value, found)


def ranks() -> int:
    """Returns how many ranks the step that runs now is for: one while an update is made in one shot."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _window(loader: Any, count: int) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Returns the first samples of a loader's dataset, and how it makes a micro-batch of samples."""
    if not isinstance(loader, DataLoader):
        raise NotProvableError(f"the trainer's samples come from a {type(loader).__name__}, and not from a DataLoader.")
    if loader.batch_size is None and loader.batch_sampler is None:
        raise NotProvableError("the trainer's DataLoader has batch_size=None: batches that are ready can't be cut.")
    dataset: Any = loader.dataset
    if hasattr(dataset, "__getitem__"):
        samples = [dataset[place] for place in range(min(count, len(dataset)))]
    else:
        samples = list(itertools.islice(dataset, count))
    if ranks() > 1:  # what ranks read of a stream differs, and what a dataset draws
        everyones: list[Any] = [None] * ranks()
        dist.all_gather_object(everyones, samples)
        samples = everyones[0]
    return samples, loader.collate_fn


class _Batches:
    """Micro-batches as a loader that no trainer takes apart."""

    def __init__(self, batches: list[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


def forget_accelerate() -> None:
    """Makes Accelerate look anew how many ranks there are: it keeps that for a process's life otherwise."""
    state: Any = importlib.import_module("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


def _of_transformers(make_trainer: Callable[[], Any], made: Any, count: int) -> Loop:
    if made.is_fsdp_enabled or made.is_deepspeed_enabled:
        raise NotProvableError(
            "the trainer shards by FSDP or DeepSpeed, which is not supported here: prove it on one rank, or with DDP."
        )
    samples, collate = _window(made.get_train_dataloader(), count)

    def build() -> tuple[nn.Module, Any]:
        forget_accelerate()
        trainer = make_trainer()
        if trainer.args.world_size != ranks():
            raise NotProvableError(
                "the trainer's arguments were made outside make_trainer, for another number of ranks: make them in it."
            )
        return trainer.model, trainer

    def step(_: nn.Module, trainer: Any, micro_batches: list[Any]) -> None:
        trainer.model_init = None  # the model has been made
        trainer.args.gradient_accumulation_steps = len(micro_batches)
        trainer.args.max_steps = 1
        trainer.args.auto_find_batch_size = trainer.args.eval_on_start = False
        trainer.get_train_dataloader = lambda: _Batches(micro_batches)
        handler = trainer.callback_handler
        handler.callbacks = [one for one in handler.callbacks if not type(one).__module__.startswith("transformers.")]
        trainer.train()

    return Loop(build=build, samples=samples, step=step, collate=collate)


def _of_lightning(make_trainer: Callable[[], Any], made: Any, count: int) -> Loop:
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[1], nn.Module):
        raise NotProvableError(
            "of Lightning, make_trainer must return (trainer, module) or (trainer, module, loader or datamodule), and "
            f"has returned {made!r:.200}."
        )
    trainer, module, loader = (*made, made[1])[:3]
    if type(trainer.strategy).__name__ not in ("SingleDeviceStrategy", "DDPStrategy"):
        raise NotProvableError(
            f"the trainer's {type(trainer.strategy).__name__} is not supported here: prove it on one rank, or with DDP."
        )
    if trainer.world_size not in (1, ranks()):
        raise NotProvableError(
            f"the trainer wants {trainer.world_size} ranks, and there are {ranks()}: start as many with torchrun "
            f"--nproc_per_node={trainer.world_size}, or give it devices=1."
        )
    if not getattr(module, "automatic_optimization", True):
        raise NotProvableError(
            "the module optimizes manually, so its loop is its own: return a distaccum.testing.Loop with it as step."
        )
    if hasattr(loader, "train_dataloader"):
        loader.prepare_data()
        loader.setup("fit")
        loader = loader.train_dataloader()
    samples, collate = _window(loader, count)

    def build() -> tuple[nn.Module, Any]:
        trainer, module, *_ = make_trainer()
        return module, trainer

    def step(module: nn.Module, trainer: Any, micro_batches: list[Any]) -> None:
        trainer.accumulate_grad_batches = len(micro_batches)
        trainer.fit_loop.max_epochs = 1
        trainer.limit_train_batches = 1.0
        trainer.limit_val_batches = trainer.num_sanity_val_steps = trainer.overfit_batches = 0
        trainer.loggers = []
        own = ("lightning.", "pytorch_lightning.")
        trainer.callbacks = [one for one in trainer.callbacks if not type(one).__module__.startswith(own)]
        trainer.fit(module, train_dataloaders=_Batches(micro_batches))

    return Loop(build=build, samples=samples, step=step, collate=collate)
