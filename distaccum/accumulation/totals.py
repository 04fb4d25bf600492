"""Sums of a window besides its gradients (loss, weight, metrics), one vector a rank; and errors for NaN in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distaccum.accumulation.open_window import OpenWindow
from distaccum.accumulation.scalars import added_up, added_weights
from distaccum.errors import NonfiniteError, UserError
from distaccum.loaders import Window
from distaccum.runtime.nested import gather_objects
from distaccum.strategies import Strategy
from distaccum.strategies.scalar_sync import summed_beside

Layout = list[tuple[str, tuple[int, ...]]]
"""Names and shapes of a window's sums, by name."""


class SumsOverRanks:
    """Adds up loss, weight, flags, reports and further sums of a window over micro-steps and ranks.

    Each rank has one vector, and all vectors must have the same length and layout. So they have room for the sums that
    the ranks have agreed on, and a count of the ranks whose sums differ from those. Only if it is not zero do the ranks
    exchange names and shapes.

    Args:
        flags, reports: those of the accumulator.
    """

    def __init__(
        self, strategy: Strategy, flags: Mapping[str, Callable[[], bool]], reports: Mapping[str, Callable[[], float]]
    ) -> None:
        self._strategy = strategy
        self._flags = flags
        self._reports = reports
        self.agreed: Layout = []
        """Saved with a run, as the last bits of the gradients depend on the length of the vector sent with them."""

    def own(self, window: OpenWindow) -> Tensor:
        """Returns this rank's vector: float64, on the device."""
        layout, device = _layout(window), self._strategy.device
        if self._strategy.process_group is None and not isinstance(layout, str):
            self.agreed = layout
        differs = layout != self.agreed
        room = sum(math.prod(shape) for _, shape in self.agreed)
        sums = [torch.zeros(room, dtype=torch.float64, device=device)] if differs else self._own_sums(window)
        weight = added_weights(window.weights, device)
        answers = self._answers(differs, window.norm_before)
        terms = [window.terms.own()] if window.terms is not None else []
        return torch.cat([added_up(window.loss_sums, device), weight, answers, *terms, *sums])

    def _own_sums(self, window: OpenWindow) -> list[Tensor]:
        totals = (window.sums[name].total for name in sorted(window.sums))
        return [total.to(self._strategy.device, non_blocking=True).reshape(-1) for total in totals]

    def _answers(self, differs: bool, norm_before: float) -> Tensor:
        """Vector of: whether the sums differ, the last norm, the flags, and the reports with a place for each rank."""
        group, ranks = self._strategy.process_group, self._strategy.world_size
        rank, reports_at = dist.get_rank(group) if group is not None else 0, 2 + len(self._flags)
        answers: dict[int, float] = {0: differs, 1: norm_before}
        answers |= {2 + number: ask() for number, ask in enumerate(self._flags.values())}
        answers |= {reports_at + number * ranks + rank: ask() for number, ask in enumerate(self._reports.values())}
        count = reports_at + len(self._reports) * ranks
        vector = torch.zeros(count, dtype=torch.float64, device=self._strategy.device)
        for place, answer in answers.items():
            if answer:
                vector[place].fill_(answer)  # copying the answers to a GPU would make the host wait
        return vector

    def read(self, numbers: Tensor, window: OpenWindow, norm_dtype: torch.dtype) -> dict[str, Any]:
        """Returns what `UpdateResult` has of losses, weight, flags, reports and sums, from the sum of all ranks' `own`.

        Args:
            numbers: that sum, on the CPU.

        Raises:
            UserError: sums differ in names or shapes, between micro-steps or ranks, or a rank had no micro-batch; a
                term's weight is not what was counted when the window opened; or the gradient of the update before had
                another norm on this rank than on the average of all.
        """
        ranks = self._strategy.world_size
        sums_at = 4 + len(self._flags) + ranks * len(self._reports)
        loss_sum, weight, differing, norm_before, *answers = numbers[:sums_at].tolist()
        flags, reports = answers[: len(self._flags)], answers[len(self._flags) :]
        terms, sums = numbers[sums_at:], numbers[sums_at:]
        if window.terms is not None:
            terms, sums = numbers[sums_at:].tensor_split([window.terms.count])
        if differing:
            self._agree(window)
            mine = self._own_sums(window)
            sums = summed_beside(torch.cat(mine), self._strategy.process_group)().cpu() if mine else sums[:0]
        _require_same_norm(window, norm_before / ranks, norm_dtype)
        parts = torch.split(sums, [math.prod(shape) for _, shape in self.agreed])
        shaped = {name: part.reshape(shape) for part, (name, shape) in zip(parts, self.agreed, strict=True)}
        of_loss: dict[str, Any] = {"loss": loss_sum / weight if weight else math.nan}
        if window.terms is not None:
            of_loss = window.terms.read(terms.tolist(), loss_sum, weight, window.number)
        return of_loss | {
            "weight": weight,
            "flags": frozenset(name for name, raised in zip(self._flags, flags, strict=True) if raised),
            "reports": {name: tuple(reports[n * ranks : (n + 1) * ranks]) for n, name in enumerate(self._reports)},
            "sums": {name: shaped[name] for name in window.sums},  # in the order in which the user gave them
        }

    def _agree(self, window: OpenWindow) -> None:
        everyone: list[Any] = gather_objects(_layout(window), self._strategy.process_group)
        for rank, layout in enumerate(everyone):
            if isinstance(layout, str):
                raise UserError(f"rank {rank}: {layout}")
        other = next((rank for rank, layout in enumerate(everyone) if layout != everyone[0]), 0)
        if other:
            first, second = (", ".join(f"{name} {list(shape)}" for name, shape in everyone[n]) for n in (0, other))
            raise UserError(
                f"the ranks' sums differ: rank 0 has {first or 'none'}; rank {other} has {second or 'none'}. Give the "
                "same names and shapes on each rank, zeros where there is nothing to add."
            )
        self.agreed = everyone[0]

    def sync_without_micro_batch(self, window: OpenWindow, module: nn.Module) -> None:
        """Takes part in the sync although this rank has had no micro-batch, so that `read` raises on all ranks.

        Raises:
            UserError: at once, where the strategy can't sync without a micro-batch.
        """
        strategy = self._strategy
        if strategy.process_group is None or not strategy.can_recover:
            raise UserError(_NO_MICRO_BATCH)
        strategy.begin_window()
        loss = torch.stack([entry.sum() for entry in module.parameters() if entry.requires_grad]).sum() * 0
        window.loss_sums, window.weights = [loss.detach()], [0.0]
        window.totals = strategy.summed(self.own(window))
        strategy.begin_sync(loss)
        loss.backward()  # type: ignore[no-untyped-call]
        if window.micro_gradients is not None:
            window.micro_gradients.start()


_NO_MICRO_BATCH = (
    "the window has no micro-batch. Each rank needs one: where none is left, any, with weight 0 and loss_sum * 0, "
    "as a WindowLoader does by itself."
)


def _layout(window: OpenWindow) -> Layout | str:
    """Returns the layout of a window's sums; or a sentence that says what is wrong with them."""
    for name, added in window.sums.items():
        if added.count != window.micro_steps or len(added.shapes) > 1:
            return (
                f"sums[{name!r}] came in {added.count} of {window.micro_steps} micro-steps, with the shapes "
                f"{sorted(map(tuple, added.shapes))}. Give the same names and shapes in each micro-step, "
                "zeros where there is nothing to add."
            )
    named = [(name, tuple(window.sums[name].total.shape)) for name in sorted(window.sums)]
    return named if window.micro_steps else _NO_MICRO_BATCH


def require_summable(loss_sum: Tensor, weight: Tensor | float) -> None:
    """Refuses what can't be a loss or a weight. Values of tensors are checked when the window ends and reads them."""
    if loss_sum.ndim != 0 or not loss_sum.requires_grad:
        raise UserError(
            f"loss_sum must be a scalar tensor with a gradient; got shape {tuple(loss_sum.shape)}, "
            f'requires_grad={loss_sum.requires_grad}. Use reduction="sum" on the output of the model.'
        )
    if not (weight.ndim == 0 if isinstance(weight, Tensor) else 0 <= weight < math.inf):
        got = f"shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else weight
        raise UserError(
            f"weight must be a scalar tensor, or a finite number of at least 0; got {got}. It is the number of "
            "elements that loss_sum adds up, as (targets != -100).sum()."
        )


def _require_same_norm(window: OpenWindow, mean: float, dtype: torch.dtype) -> None:
    """Refuses a rank whose last gradient norm differs from the mean of the ranks'.

    Norms are sent with the sums of the next window, so that of a run's last update is never compared.

    Args:
        dtype: the norms' format, which different devices may round differently.
    """
    mine = window.norm_before
    if abs(mine - mean) > mean * max(1e-5, 4 * torch.finfo(dtype).eps):
        raise UserError(
            f"update {window.number - 1}: the gradient's norm was {mine:.9g} on rank {dist.get_rank()}, {mean:.9g} on "
            "the average of the ranks, so their parameters differ since then. Look for what changes gradients after "
            "the sync, or the optimizer's parameters, on some ranks alone; and go on from a checkpoint before that "
            "update."
        )


def loss_scale(micro_batches: Iterable[Any], last_weight: float | None) -> float:
    """Returns the power of two near 1 / (total weight) by which every loss of a window is multiplied.

    It keeps gradients of sums in the range of gradients of means, for float16 and for compressed buckets. Being a
    power of two, it changes no bit otherwise. It must be the same on all ranks, so it comes from numbers that all
    know: the total weight of the window before, or the size of the first window.
    """
    weight = last_weight
    if weight is None:
        weight = micro_batches.num_samples if isinstance(micro_batches, Window) else 1.0
    return 2.0 ** -round(math.log2(weight)) if math.isfinite(weight) and weight > 0 else 1.0


def is_to_be_made(
    window: OpenWindow,
    loss: float,
    weight: float,
    grad_norm: float,
    skips_nonfinite: bool,
    scaler: torch.amp.GradScaler | None,
) -> bool:
    """Whether an update is to be made, or else skipped. All ranks see the same numbers, so all get the same answer.

    Raises:
        NonfiniteError: it is neither.
    """
    has_loss = math.isfinite(loss) and 0 < weight < math.inf
    if has_loss and math.isfinite(grad_norm):
        return True
    # After an overflow of scaled gradients the scaler lowers its scale.
    if skips_nonfinite or (has_loss and scaler is not None and scaler.get_scale() >= 1):
        return False
    if not math.isfinite(weight):
        wrong = _where(window.weights, lambda value: 0 <= value < math.inf, window.strategy)
        what = f"a weight is negative, infinite or NaN{wrong}"
    elif weight <= 0:
        what = f"the total weight of the window is {weight:g}, so there is nothing to take the mean of"
    elif not math.isfinite(loss):
        of_term = window.terms.said_of_nonfinite() if window.terms is not None else ""
        what = f"the loss is {loss}{of_term}{_where(window.loss_sums, math.isfinite, window.strategy)}"
    else:
        what = f"the loss is {loss:.6g}, but the norm of the gradient is {grad_norm}"
    raise NonfiniteError(
        f"update {window.number}: {what}. The parameters have not moved. Look at that data, lower the learning rate, "
        "or leave such updates out with train.on_nonfinite=skip."
    )


def _where(values: Sequence[Tensor | float], is_right: Callable[[float], bool], strategy: Strategy) -> str:
    """Names the ranks and micro-steps of wrong values. All ranks call it."""
    mine = [step for step, value in enumerate(values, 1) if not is_right(float(value))]
    found = [
        f"rank {rank}, micro-step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))}"
        for rank, steps in enumerate(gather_objects(mine, strategy.process_group))
        if steps
    ]
    return f" ({'; '.join(found)})" if found else ""
