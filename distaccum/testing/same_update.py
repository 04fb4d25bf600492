"""Fails where an update depends on how its window of samples is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import default_collate

from distaccum.runtime.nested import mapped
from distaccum.testing.causes import (
    ALIKE,
    Cause,
    above,
    cause_after,
    combination,
    coupled,
    error_of_all,
    errors_of,
    explained,
    flat,
    named,
    numbers,
)
from distaccum.testing.recording import (
    NotProvableError,
    Update,
    as_float64,
    copied,
    float64,
    prepare,
    recorded,
    require_built,
    tensors_of,
)

T = TypeVar("T")
Build = Callable[[], tuple[nn.Module, Any]]
Step = Callable[[nn.Module, Any, list[Any]], object]

_MOST_MICRO_STEPS = 8
_SMALL = 2.0**-30
"""Gradients are multiplied by it to be below any norm that they are clipped to; a power of two changes no digit."""


class UpdateDiffersError(AssertionError):
    """The update depends on how its window is cut; the message says by how much, where, and why most likely."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    """A step to be proved, with what it needs: arguments of `assert_same_update`.

    Attributes:
        build: returns the model, and what else the step is given: its optimizer, mostly.
    """

    build: Build
    samples: Sequence[Any]
    step: Step
    collate: Callable[[list[Any]], Any] = default_collate
    uneven: bool = True


Cut = list[list[list[int]]]
"""For each rank, the places in the window of each micro-batch's samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The update of a window under one cut, compared with that in one shot.

    Attributes:
        sizes: samples of each micro-batch, by rank.
        gradients: relative difference of each gradient that the optimizer gets, largest first. Where it clips, and that
            hides a difference, of the gradient before clipping.
        after: the same of parameters and buffers after the step.
        gradient_error, after_error: that of all of them together.
        tolerance: for each of them.
        before_clipping: gradients were so small that nothing was clipped.
        cause: None if the updates are the same.
    """

    sizes: list[list[int]]
    gradients: dict[str, float]
    after: dict[str, float]
    gradient_error: float
    after_error: float
    tolerance: float
    before_clipping: bool
    cause: Cause | None

    def message(self) -> str:
        """Says how the update differs from the one in one shot, and why most likely."""
        sizes = self.sizes
        where = f"micro-batches of {sizes[0]} samples" if len(sizes) == 1 else f"micro-batches of the ranks: {sizes}"
        lines = [f"the update depends on how its window of {sum(map(sum, sizes))} samples is cut ({where})."]
        if wrong := above(self.gradients, self.tolerance):
            which = "before clipping" if self.before_clipping else "that the optimizer gets"
            lines.append(f"The gradient {which} is off: {named(wrong)}.")
        else:
            after = above(self.after, self.tolerance)
            lines.append(f"The gradient is right, but after the step these differ: {named(after)}.")
        return "\n  ".join([*lines, *(self.cause.lines() if self.cause else [])])


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
    All of it in float64, so that what is left is no rounding; modules of dropout drop nothing. Where the step clips,
    that is done once more with gradients so small that nothing is: clipping to a norm hides a wrong factor.

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

    def built() -> tuple[nn.Module, Any]:
        found = build()
        require_built(found)
        return found

    loop = Loop(build=built, samples=samples, step=step, collate=collate, uneven=uneven)
    assert_same(loop, tolerance=tolerance, seed=seed)


def assert_same(loop: Loop, *, tolerance: float, seed: int) -> None:
    """Fails at the first cut that makes another update."""
    for comparison in comparisons(loop, tolerance=tolerance, seed=seed):
        if comparison.cause:
            raise UpdateDiffersError(comparison.message())


def comparisons(loop: Loop, *, tolerance: float = 1e-6, seed: int = 0) -> Iterator[Comparison]:
    """Compares the update of each cut with the one in one shot; all ranks get the same.

    Args:
        loop, tolerance, seed: as for `assert_same_update`.

    Raises:
        UpdateDiffersError: the same update twice is not the same, or there is none.
        NotProvableError: there are too few samples, or `build` has made something else.
    """
    prover = _Prover(loop, tolerance, seed)
    whole = prover.alone([prover.everyone])
    prover.require_repeatable(whole)
    unclipped = prover.unclipped(whole)
    for cut in prover.cuts(uneven=loop.uneven):
        yield (unclipped and prover.difference(unclipped, cut)) or prover.comparison(whole, cut)


class _Prover:
    """Makes updates of one window and compares them."""

    def __init__(self, loop: Loop, tolerance: float, seed: int) -> None:
        is_joined = dist.is_available() and dist.is_initialized()
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if is_joined else (0, 1)
        self._samples = list(loop.samples)
        if len(self._samples) < 2 * self.world_size:
            raise NotProvableError(
                f"{len(self._samples)} samples can't be cut into micro-batches of {self.world_size} rank(s): give at "
                f"least {2 * self.world_size}."
            )
        self.everyone = list(range(len(self._samples)))
        self._loop, self._tolerance, self._seed = loop, tolerance, seed
        self._own_group: Any = None
        if self.world_size > 1:
            self._own_group = dist.new_subgroups(group_size=1)[0]  # type: ignore[no-untyped-call]

    def cuts(self, *, uneven: bool) -> Iterator[Cut]:
        """Yields cuts in which all ranks have equally many micro-batches."""
        share, left = divmod(len(self.everyone), self.world_size)
        if left and not uneven:
            raise NotProvableError(f"{len(self.everyone)} samples are no equal shares of {self.world_size} ranks.")
        shares = [share + (rank < left) for rank in range(self.world_size)]
        for steps in sorted({2, 3, min(share, _MOST_MICRO_STEPS)} - {1}):
            if steps <= share and (uneven or share % steps == 0):
                yield self._dealt([[size // steps + (i < size % steps) for i in range(steps)] for size in shares])
        if uneven and share > 2:
            yield self._dealt([[size - 1, 1] for size in shares])

    def _dealt(self, sizes: list[list[int]]) -> Cut:
        places = iter(self.everyone)
        return [[[next(places) for _ in range(size)] for size in of_rank] for of_rank in sizes]

    def alone(self, micro_batches: list[list[int]], *, step_seed: int | None = None, scale: float = 1.0) -> Update:
        """Makes an update as if this rank were the only one: what the group of all ranks is then holds itself alone."""
        if self._own_group is None:
            return self.update(micro_batches, step_seed=step_seed, scale=scale)
        everyone = dist.group.WORLD
        dist.group.WORLD = self._own_group
        try:
            return self.update(micro_batches, step_seed=step_seed, scale=scale)
        finally:
            dist.group.WORLD = everyone

    def update(self, micro_batches: list[list[int]], *, step_seed: int | None = None, scale: float = 1.0) -> Update:
        """Makes the update of micro-batches, given as places in the window, from the initial state."""
        update = Update(scale=scale)
        with float64():
            torch.manual_seed(self._seed)
            model, beside = self._loop.build()
            prepare(model)
            batches = [self._loop.collate([self._samples[place] for place in places]) for places in micro_batches]
            torch.manual_seed(self._seed if step_seed is None else step_seed)
            with recorded(model, update):
                self._loop.step(model, beside, [mapped(batch, as_float64) for batch in batches])
        update.after = {name: copied(tensor) for name, tensor in tensors_of(model)}
        return update

    def require_repeatable(self, whole: Update) -> None:
        """Refuses a step that draws random numbers, whose updates can't be compared.

        Raises:
            UpdateDiffersError: names the tensors.
        """
        if not whole.steps:
            raise UpdateDiffersError("the optimizer has not stepped: step must end in optimizer.step().")
        again = self.alone([self.everyone], step_seed=self._seed + 1)
        if moved := above(errors_of(again.gradients, whole.gradients), self._tolerance):
            raise UpdateDiffersError(
                f"the same window twice in one shot, with another seed, gives another gradient ({named(moved)}): "
                "step or model draw random numbers, so cuts can't be compared. Build the model without them: dropout "
                "that is no module of torch's, random depth, noise."
            )

    def unclipped(self, whole: Update) -> Update | None:
        """Returns the update in one shot with small gradients; None if they are the same ones, so nothing was clipped.

        Gradients of sharded models can't be made small: None for them.
        """
        if not whole.raw:
            return None
        small = self.alone([self.everyone], scale=_SMALL)
        grown = {name: gradient / _SMALL for name, gradient in small.gradients.items()}
        return small if self._anywhere(bool(above(errors_of(grown, whole.gradients), self._tolerance))) else None

    def comparison(self, whole: Update, cut: Cut) -> Comparison:
        """Compares the update of a cut with the one in one shot; all ranks get that of the first that differs."""
        found = self.gathered(self._compared(whole, self.update(cut[self.rank], scale=whole.scale), cut))
        return next((comparison for comparison in found if comparison.cause), found[0])

    def difference(self, whole: Update, cut: Cut) -> Comparison | None:
        """Returns the comparison if the update of a cut differs from the one in one shot."""
        found = self.comparison(whole, cut)
        return found if found.cause else None

    def _compared(self, whole: Update, update: Update, cut: Cut) -> Comparison:
        gradients, after = errors_of(update.gradients, whole.gradients), errors_of(update.after, whole.after)
        is_right, is_right_after = (not above(errors, self._tolerance) for errors in (gradients, after))
        # Looked for on all ranks, or on none.
        cause = self._cause(whole, update, cut, is_right=is_right)
        is_same = is_right and is_right_after and update.steps == whole.steps
        return Comparison(
            sizes=[[len(places) for places in of_rank] for of_rank in cut],
            gradients=gradients,
            after=after,
            gradient_error=error_of_all(update.gradients, whole.gradients),
            after_error=error_of_all(update.after, whole.after),
            tolerance=self._tolerance,
            before_clipping=whole.scale != 1.0,
            cause=None if is_same else cause,
        )

    def _cause(self, whole: Update, update: Update, cut: Cut, *, is_right: bool) -> Cause:
        if self._anywhere(update.steps != whole.steps):
            return Cause(
                "several_steps",
                f"the optimizer has stepped {update.steps} times for one window, and {whole.steps} times in one shot",
                "one optimizer.step() after the last backward",
            )
        if self._anywhere(self._ranks_disagree(update)):
            return Cause(
                "no_sync",
                "each rank steps with a gradient of its own, so nothing was summed over the ranks",
                "run the last backward of a window outside no_sync(), after the wrapped model's forward",
            )
        if not self._anywhere(not is_right):
            return cause_after(whole)
        singles = [self.alone([places], scale=whole.scale) for of_rank in cut for places in of_rank]
        parts = torch.stack([flat(_unclipped(single), whole) for single in singles], 1)
        right, error = combination(parts, flat(_unclipped(whole), whole))
        if error > max(ALIKE, self._tolerance):
            return coupled(whole)
        found, error = combination(parts, flat(update.gradients, whole))
        cause = explained(found, right, len(cut), is_combination=error <= max(ALIKE, self._tolerance))
        return cause._replace(
            what=f"Micro-batches count {numbers(found)} in the gradient, and should count {numbers(right)}."
        )

    def _ranks_disagree(self, update: Update) -> bool:
        first, *others = self.gathered({name: float(value.norm()) for name, value in update.gradients.items()})
        return any(
            other.keys() != first.keys()
            or any(abs(other[name] - first[name]) > self._tolerance * max(first[name], 1e-12) for name in first)
            for other in others
        )

    def _anywhere(self, found: bool) -> bool:
        """Returns whether it was found on any rank, as all must look for the cause that one looks for."""
        return any(self.gathered(found))

    def gathered(self, value: T) -> list[T]:
        """Returns every rank's value, in the order of the ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


def _unclipped(update: Update) -> dict[str, Tensor]:
    """Returns gradients before clipping, where they are known."""
    return update.gradients if update.scale != 1.0 else update.raw or update.gradients
