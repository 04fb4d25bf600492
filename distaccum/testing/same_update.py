"""Fails where an update depends on how its window of samples is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import default_collate

from distaccum.runtime.nested import mapped
from distaccum.testing.causes import cause_after, combination, coupled, different, explained, flat, named, numbers
from distaccum.testing.recording import Update, as_float64, copied, float64, innermost, prepare, record, tensors_of

Build = Callable[[], tuple[nn.Module, torch.optim.Optimizer]]
Step = Callable[[nn.Module, torch.optim.Optimizer, list[Any]], object]

_MOST_MICRO_STEPS = 8


class UpdateDiffersError(AssertionError):
    """The update depends on how its window is cut; the message says by how much, where, and why most likely."""


def assert_same_update(
    build: Build,
    samples: Sequence[Any],
    step: Step,
    *,
    collate: Callable[[list[Any]], Any] = default_collate,
    uneven: bool = True,
    tolerance: float = 1e-6,
    seed: int = 0,
) -> None:
    """Fails unless a step makes the same update of a window for every cut into micro-batches and ranks.

    The update in one shot, `step(model, optimizer, [collate(samples)])` on one rank, is compared with those of several
    cuts, each from the same initial state: gradients as the optimizer gets them, parameters and buffers after its step.
    All of it in float64, so that what is left is no rounding; modules of dropout drop nothing.

    Args:
        build: makes model and optimizer, on the ranks wrapped in DDP or FSDP. It is called once for each update, with
            torch's default format float64 and the same seed. A model with parameters in another format is converted,
            if it is not wrapped.
        samples: of one window, at least two for each rank; all ranks give the same. Unequal ones (lengths, tokens that
            count) show more than equal ones.
        step: makes one update of micro-batches, as the loop to be proved does: forwards, backwards, clipping,
            `optimizer.step()`. It is given those of this rank.
        collate: makes a micro-batch of samples.
        uneven: cut into micro-batches of unequal sizes as well; False for a step that is only meant for equal ones.
        tolerance: for the relative difference of each tensor. The default leaves room for losses in float32, as
            transformers computes them; 1e-12 does where all is float64.
        seed: set before the model is built, and before the step.

    Raises:
        UpdateDiffersError: an AssertionError that names the tensors and the likeliest cause.
        ValueError: there are too few samples, or `build` has made something else.
    """
    prover = _Prover(build, list(samples), step, collate, seed)
    whole = prover.alone([prover.everyone])
    prover.require_repeatable(whole, tolerance)
    for cut in prover.cuts(uneven=uneven):
        update = prover.update(cut[prover.rank])
        problem = prover.problem(whole, update, cut, tolerance)
        if prover.world_size > 1:
            problems: list[str | None] = [None] * prover.world_size
            dist.all_gather_object(problems, problem)
            problem = next(filter(None, problems), None)
        if problem:
            raise UpdateDiffersError(problem)


Cut = list[list[list[int]]]
"""For each rank, the places in the window of each micro-batch's samples."""


class _Prover:
    """Makes updates of one window and compares them."""

    def __init__(
        self, build: Build, samples: list[Any], step: Step, collate: Callable[[list[Any]], Any], seed: int
    ) -> None:
        is_joined = dist.is_available() and dist.is_initialized()
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if is_joined else (0, 1)
        if len(samples) < 2 * self.world_size:
            raise ValueError(
                f"{len(samples)} samples can't be cut into micro-batches of {self.world_size} rank(s): give at least "
                f"{2 * self.world_size}."
            )
        self.everyone = list(range(len(samples)))
        self._build, self._samples, self._step, self._collate, self._seed = build, samples, step, collate, seed
        self._own_group: Any = None
        if self.world_size > 1:
            self._own_group = dist.new_subgroups(group_size=1)[0]  # type: ignore[no-untyped-call]

    def cuts(self, *, uneven: bool) -> Iterator[Cut]:
        """Yields cuts in which all ranks have equally many micro-batches."""
        share, left = divmod(len(self.everyone), self.world_size)
        if left and not uneven:
            raise ValueError(f"{len(self.everyone)} samples are no equal shares of {self.world_size} ranks.")
        shares = [share + (rank < left) for rank in range(self.world_size)]
        for steps in sorted({2, 3, min(share, _MOST_MICRO_STEPS)} - {1}):
            if steps <= share and (uneven or share % steps == 0):
                yield self._dealt([[size // steps + (i < size % steps) for i in range(steps)] for size in shares])
        if uneven and share > 2:
            yield self._dealt([[size - 1, 1] for size in shares])

    def _dealt(self, sizes: list[list[int]]) -> Cut:
        places = iter(self.everyone)
        return [[[next(places) for _ in range(size)] for size in of_rank] for of_rank in sizes]

    def alone(self, micro_batches: list[list[int]], *, step_seed: int | None = None) -> Update:
        """Makes an update as if this rank were the only one: what the group of all ranks is then holds itself alone."""
        if self._own_group is None:
            return self.update(micro_batches, step_seed=step_seed)
        everyone = dist.group.WORLD
        dist.group.WORLD = self._own_group
        try:
            return self.update(micro_batches, step_seed=step_seed)
        finally:
            dist.group.WORLD = everyone

    def update(self, micro_batches: list[list[int]], *, step_seed: int | None = None) -> Update:
        """Makes the update of micro-batches, given as places in the window, from the initial state."""
        update = Update()
        with float64():
            torch.manual_seed(self._seed)
            built = self._build()
            if not (isinstance(built, tuple) and len(built) == 2 and isinstance(built[0], nn.Module)):
                raise ValueError(f"build must return the model and its optimizer, and has returned {built!r:.200}.")
            model, optimizer = built
            prepare(model)
            record(model, innermost(optimizer), update)
            batches = [self._collate([self._samples[place] for place in places]) for places in micro_batches]
            torch.manual_seed(self._seed if step_seed is None else step_seed)
            self._step(model, optimizer, [mapped(batch, as_float64) for batch in batches])
        update.after = {name: copied(tensor) for name, tensor in tensors_of(model)}
        return update

    def require_repeatable(self, whole: Update, tolerance: float) -> None:
        """Refuses a step that draws random numbers, whose updates can't be compared.

        Raises:
            UpdateDiffersError: names the tensors.
        """
        if not whole.steps:
            raise UpdateDiffersError("the optimizer has not stepped: step must end in optimizer.step().")
        again = self.alone([self.everyone], step_seed=self._seed + 1)
        if moved := different(again.gradients, whole.gradients, tolerance):
            raise UpdateDiffersError(
                f"the same window twice in one shot, with another seed, gives another gradient ({named(moved)}): "
                "step or model draw random numbers, so cuts can't be compared. Build the model without them: dropout "
                "that is no module of torch's, random depth, noise."
            )

    def problem(self, whole: Update, update: Update, cut: Cut, tolerance: float) -> str | None:
        """Says how an update differs from the one in one shot, and why most likely; None if it does not."""
        wrong = different(update.gradients, whole.gradients, tolerance)
        after = different(update.after, whole.after, tolerance)
        # Looked for on all ranks, or on none.
        cause = self._cause(whole, update, cut, tolerance)
        if not wrong and not after and update.steps == whole.steps:
            return None
        sizes = [[len(places) for places in of_rank] for of_rank in cut]
        where = f"micro-batches of {sizes[0]} samples" if len(sizes) == 1 else f"micro-batches of the ranks: {sizes}"
        lines = [f"the update depends on how its window of {len(self.everyone)} samples is cut ({where})."]
        if wrong:
            lines.append(f"The gradient that the optimizer gets is off: {named(wrong)}.")
        else:
            lines.append(f"The gradient is right, but after the step these differ: {named(after)}.")
        return "\n  ".join([*lines, *cause])

    def _cause(self, whole: Update, update: Update, cut: Cut, tolerance: float) -> list[str]:
        if self._anywhere(update.steps != whole.steps):
            return [
                f"Likeliest cause: the optimizer has stepped {update.steps} times for one window, and {whole.steps} "
                "times in one shot.",
                "Remedy: one optimizer.step() after the last backward.",
            ]
        if self._anywhere(self._ranks_disagree(update, tolerance)):
            return [
                "Likeliest cause: each rank steps with a gradient of its own, so nothing was summed over the ranks.",
                "Remedy: run the last backward of a window outside no_sync(), after the wrapped model's forward.",
            ]
        if not self._anywhere(bool(different(update.gradients, whole.gradients, tolerance))):
            return cause_after(whole)
        singles = [self.alone([places]) for of_rank in cut for places in of_rank]
        parts = torch.stack([flat(single.raw or single.gradients, whole) for single in singles], 1)
        right, error = combination(parts, flat(whole.raw or whole.gradients, whole))
        if error > max(1e-5, tolerance):
            return coupled(whole)
        found, error = combination(parts, flat(update.gradients, whole))
        return [
            f"Micro-batches count {numbers(found)} in the gradient, and should count {numbers(right)}.",
            *explained(found, right, len(cut), is_combination=error <= max(1e-5, tolerance)),
        ]

    def _ranks_disagree(self, update: Update, tolerance: float) -> bool:
        if self.world_size == 1:
            return False
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, {name: float(value.norm()) for name, value in update.gradients.items()})
        first = gathered[0]
        return any(
            other.keys() != first.keys()
            or any(abs(other[name] - first[name]) > tolerance * max(first[name], 1e-12) for name in first)
            for other in gathered
        )

    def _anywhere(self, found: bool) -> bool:
        """Returns whether it was found on any rank, as all must look for the cause that one looks for."""
        if self.world_size == 1:
            return found
        answers: list[Any] = [None] * self.world_size
        dist.all_gather_object(answers, found)
        return any(answers)
