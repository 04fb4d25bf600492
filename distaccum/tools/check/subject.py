"""The model, the task and the samples to examine; every experiment starts from the same state of all of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from distaccum import planning
from distaccum.config.enums import PrecisionName
from distaccum.config.tools import CheckConfig
from distaccum.errors import UserError
from distaccum.loaders.collate import PadCollate
from distaccum.loaders.pack import packing_of
from distaccum.planning.packed import cut_packed
from distaccum.runtime.devices import cast
from distaccum.runtime.nested import tensors_of, to_device
from distaccum.runtime.randomness import derived_seed, seed_everything
from distaccum.tasks import TaskOutput, checked_output
from distaccum.tools.check.recording import Recording, recording
from distaccum.tools.check.stillness import StillDraws, WideCasts
from distaccum.training.build import Parts
from distaccum.training.data import collate_fn

NOISE = 1e-9
"""In float64, a relative difference below this is rounding."""
LOW_NOISES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The same for models and losses that compute in a lower format whatever the format of their inputs."""

FOUND_OUT = ("is_random", "has_float64", "widens", "noise", "has_unused")
"""Attributes of a `Subject` that experiments set."""


class Samples:
    """The training samples, each loaded once so that every experiment sees the same ones."""

    def __init__(self, config: CheckConfig, dataset: Any, device: torch.device) -> None:
        given = collate_fn(config.data)
        self.collate: Callable[[list[Any]], Any] = given or getattr(dataset, "collate_fn", None) or PadCollate()
        self.dataset = dataset
        self.device = device
        self._seed = derived_seed(config.seed, "check", "samples")
        self._loaded: dict[int, Any] = {}

    def packed(self) -> Samples:
        """Returns the same samples, whose micro-batches are packed as a training's are."""
        other = copy.copy(self)
        other.collate = packing_of(self.dataset)
        return other

    def load(self, index: int, repeat: int = 0) -> Any:
        """Loads a sample from the dataset, with the seeds of this repeat."""
        seed_everything(derived_seed(self._seed, index, repeat))
        with _refusal(f"sample {index} of the training data could not be loaded"):
            return self.dataset[index]

    def __getitem__(self, index: int) -> Any:
        if index not in self._loaded:
            self._loaded[index] = self.load(index)
        return self._loaded[index]

    def batch(self, indices: Sequence[int], dtype: torch.dtype | None, draw: int = 0) -> Any:
        """Makes a micro-batch on the device, with floating-point tensors in `dtype`; `draw` is a seed of the
        collation."""
        # Copies, because a collate may pass samples through, and a model may change its inputs.
        samples = [copy.deepcopy(self[index]) for index in indices]
        seed_everything(derived_seed(self._seed, "collate", indices[0], draw))  # as in a training
        with _refusal(f"the samples {list(indices)} could not be made into a micro-batch"):
            batch = self.collate(samples)
        return to_device(batch, self.device, float_dtype=dtype)

    def size(self, index: int) -> int:
        """Returns the number of elements of all tensors of a sample, which tells long samples from short ones."""
        return sum(tensor.numel() for tensor in tensors_of(self[index]))


@contextmanager
def _refusal(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{what}: {said}") from error


class RowsOfOne(Samples):
    """Micro-batches made of the rows of one that is collated once, so that the collate function has no part in them."""

    def __init__(self, samples: Samples, indices: Sequence[int]) -> None:
        vars(self).update(vars(samples))
        self._whole = samples.batch(indices, None)
        self._places = {index: place for place, index in enumerate(indices)}

    def batch(self, indices: Sequence[int], dtype: torch.dtype | None, draw: int = 0) -> Any:
        def rows(tensor: Tensor) -> Tensor:
            return tensor[places] if tensor.ndim > 0 and len(tensor) == len(self._places) else tensor

        places = [self._places[index] for index in indices]
        return to_device(tree_map_only(Tensor, rows, self._whole), self.device, float_dtype=dtype)


class Subject:
    """The model, the task and the data to examine.

    Attributes:
        model: as it was built; it is never changed.
        is_random: True once it is known that forwards draw random numbers; they are then replaced by their means.
        has_float64: False once it is known that the model can't be computed in float64.
        widens: True once it is known that it casts to lower formats, which are then taken as float64.
        noise: the largest relative difference that counts as rounding.
        has_unused: True once it is known that the loss doesn't depend on some parameters.
        term: the name of the further loss that probes give loss and weight of; empty for the main loss.
        in_float64: whether it is computed in float64, as far as the model can be, or in the configured precision.
    """

    def __init__(self, config: CheckConfig, parts: Parts, device: torch.device) -> None:
        self.config = config
        self.precision = parts.precision
        self.woken = parts.woken
        self.device = device
        self.loader = parts.loader
        self.task = parts.task
        self.samples = Samples(config, parts.train_data, device)
        self.is_random = False
        self.has_float64 = True
        self.widens = False
        self.noise = NOISE
        self.has_unused = False
        self.in_float64 = True
        self.term = ""
        self.model = parts.module.to(device)
        self._seed = derived_seed(config.seed, "check", "forward")
        self.fresh_model()  # which may refuse

    @property
    def digits(self) -> str:
        """The name of the precision that is computed in."""
        return "float64" if self.in_float64 else self.precision.name.value

    @property
    def _is_double(self) -> bool:
        return self.in_float64 and self.has_float64

    def fresh_model(self) -> nn.Module:
        """Returns a copy of the model in the state in which it was built."""
        try:
            model = copy.deepcopy(self.model)
        except Exception as error:
            raise UserError(
                f"the model can't be copied ({type(error).__name__}: {error}), and each measurement needs a fresh "
                "copy. Let copy.deepcopy work on it (replace torch.nn.utils.weight_norm by "
                "torch.nn.utils.parametrizations.weight_norm, for example)."
            ) from error
        if self._is_double:
            return cast(model, torch.float64)
        if self.precision.name is PrecisionName.bf16_params:
            for parameter in model.parameters():
                parameter.grad_dtype = torch.float32  # as in a training: gradients are added up in float32
        return model

    def replaced(self, **attributes: Any) -> Subject:
        """Returns a copy of this subject with other attributes: another task, other samples, another precision."""
        other = copy.copy(self)
        vars(other).update(attributes)
        return other

    def as_trained(self) -> Subject:
        """Returns this subject with the micro-batches that a training has: with batch=packed, packed ones."""
        return self.replaced(samples=self.samples.packed()) if self.loader.cuts.is_packed else self

    @property
    def task_name(self) -> str:
        task = f"task ({type(self.task).__name__})"
        return f"term {self.term} of the {task}" if self.term else task

    def fresh_task(self) -> Any:
        try:
            return copy.deepcopy(self.task)
        except Exception:  # it holds something that can't be copied, so all experiments share it
            return self.task

    def batch(self, indices: Sequence[int]) -> Any:
        return self.samples.batch(indices, torch.float64 if self._is_double else self.precision.input_dtype)

    @contextmanager
    def stillness(self) -> Iterator[None]:
        """Encloses forwards, and backwards, which may compute a forward again (activation checkpointing)."""
        with ExitStack() as stack:
            if self.widens and self._is_double:
                stack.enter_context(WideCasts())
            if self.is_random:
                stack.enter_context(StillDraws())  # type: ignore[no-untyped-call]
            yield

    def backward(self, loss_sum: Tensor) -> None:
        with self.stillness():
            loss_sum.backward()  # type: ignore[no-untyped-call]

    @contextmanager
    def computing(self, seed: int = 0) -> Iterator[None]:
        """Encloses a forward, which draws the same random numbers each time, or their means."""
        seed_everything(derived_seed(self._seed, seed))
        with self.stillness(), nullcontext() if self._is_double else self.precision.autocast():
            yield

    def output(self, model: nn.Module, task: Any, batch: Any, *, seed: int = 0) -> TaskOutput:
        """Makes a forward, which draws the same random numbers each time, or their means if the model draws any."""
        with self.computing(seed):
            return checked_output(task(model, batch))

    def probe(
        self, indices: Sequence[int], *, model: nn.Module | None = None, seed: int = 0, record: bool = True
    ) -> Recording:
        """Forwards a micro-batch through a fresh copy of the model, or through `model`, and records what happened."""
        model = self.fresh_model() if model is None else model
        batch = self.batch(indices)
        with recording(model) if record else nullcontext(Recording()) as recorded:
            output = self.output(model, self.fresh_task(), batch, seed=seed)
        recorded.loss, recorded.dtype = float(output.loss_sum.detach()), output.loss_sum.dtype
        recorded.weight = float(output.weight)
        recorded.terms = frozenset(output.terms)
        if self.term:
            term = output.terms.get(self.term)
            recorded.loss = float(term.loss_sum.detach()) if term is not None else 0.0
            recorded.weight = float(term.weight) if term is not None else 0.0
        return recorded

    def close(self, one: float, other: float, *scale: float) -> bool:
        """Returns whether two sums agree up to rounding; `scale` are the numbers that were added up."""
        if one == other or (math.isnan(one) and math.isnan(other)):
            return True
        return abs(one - other) <= self.noise * max(abs(one), abs(other), *map(abs, scale))


def window_samples(subject: Subject) -> list[list[int]]:
    """Returns the dataset indices of the windows to measure: the first ones and the last one of the first epoch."""
    loader, section = subject.loader, subject.config.check
    count = loader.sizes.count(0)
    windows = list(range(min(section.windows, count)))
    if 1 < section.windows < count and not loader.cuts.is_ordered:  # to the end of a stream it is a long way
        windows[-1] = count - 1
    return [loader.cuts.samples(0, index).tolist()[: section.samples] for index in windows]


def cuts_of(size: int, configured: Sequence[int]) -> dict[str, list[int]]:
    """Returns different cuts of a window for one process, by name: the sizes of their micro-batches."""
    growing = [1]
    while sum(growing) + 2 * growing[-1] < size:
        growing.append(2 * growing[-1])
    growing.append(size - sum(growing))
    candidates = {
        "as configured": list(configured),
        "micro-batches of 1": [1] * size,
        "micro-batches of 2": [2] * (size // 2) + [1] * (size % 2),
        "three parts": planning.split_evenly(size, min(3, size)),
        "uneven": growing,
    }
    found: dict[str, list[int]] = {}
    for name, sizes in candidates.items():
        if sizes != [size] and min(sizes) > 0 and sizes not in found.values():
            found[name] = sizes
    return found


def packed_cuts(subject: Subject, window: Sequence[int]) -> dict[str, list[list[int]]]:
    """Returns packed cuts of a window for one process, by name: the dataset indices of their micro-batches."""
    schedule = subject.loader.cuts
    assert schedule.lengths is not None
    assert schedule.max_tokens is not None
    [steps] = cut_packed(schedule.lengths[list(window)], world_size=1, max_tokens=schedule.max_tokens)
    return {
        "as configured": [[window[place] for place in step] for step in steps],
        "in one row": [list(window)],
        **{name: list(split(window, sizes)) for name, sizes in cuts_of(len(window), [len(window)]).items()},
    }


def split(indices: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """Cuts a list into consecutive parts."""
    start = 0
    for size in sizes:
        yield list(indices[start : start + size])
        start += size
