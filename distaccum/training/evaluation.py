"""Exact evaluation: every sample once, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distaccum.accumulation.gradient_caching import in_float32
from distaccum.accumulation.result import TaskOutput, checked_output
from distaccum.errors import UserError
from distaccum.loaders import EvaluationLoader
from distaccum.runtime.heartbeat import Heartbeat
from distaccum.runtime.memory import free_cached_memory, is_out_of_memory
from distaccum.runtime.nested import gather_rows, leaves_of, mapped, rebuilt
from distaccum.tasks.base import CoupledTask
from distaccum.training.model import evaluation_mode


def evaluate_model(
    model: nn.Module,
    task: Callable[[nn.Module, Any], TaskOutput],
    batches: Iterable[Any],
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    heartbeat: Heartbeat | None = None,
    between: Callable[[bool], None] = lambda is_over: None,
) -> tuple[float, float, dict[str, Tensor]]:
    """Sums loss, weight and the task's sums over this rank's batches and over all ranks of the process group.

    Each rank may have any number of batches, none included. The model is put into evaluation mode and back. Where
    memory runs out, it begins again with an `EvaluationLoader`'s batches of half the size.

    Args:
        model: the module to call; the bare one if ranks take unequal numbers of forwards.
        task: a `CoupledTask` is given embeddings of `evaluation_samples` samples at a time, gathered over the ranks; so
            all ranks hold those of the whole data.
        batches: this rank's part, disjoint from the other ranks'. Placeholders of an `EvaluationLoader` count nothing.
        heartbeat: told of each batch.
        between: called before each batch with False, and with True before the ranks meet at the end; what it raises
            ends the evaluation.

    Returns:
        The mean loss, the total weight, and the sums (float64 on the CPU). The same on every rank.

    Raises:
        UserError: the total weight is zero, or memory has run out and batches can't be smaller.
    """
    doing = (heartbeat or Heartbeat(0, 1)).doing
    while True:
        evaluation = _CoupledEvaluation(task, device) if isinstance(task, CoupledTask) else _Evaluation(task, device)
        try:
            with evaluation_mode(model), torch.no_grad():
                for number, batch in enumerate(batches):
                    between(False)
                    doing("forward of an evaluation", micro_step=number + 1)
                    is_counted = not isinstance(batches, EvaluationLoader) or batches.sizes[number] > 0
                    evaluation.forward(model, batch, autocast, is_counted=is_counted)
            break
        except Exception as error:
            if not isinstance(batches, EvaluationLoader) or not is_out_of_memory(error):
                raise
            said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        free_cached_memory(device)  # not before: the exception's traceback held what the forward had computed
        batches.halve(said)
    between(True)
    doing("end of an evaluation", waits=True)
    totals = evaluation.totals_over_ranks()
    doing("time after an evaluation")
    weight = float(totals.pop("weight", 0.0))
    if weight <= 0:
        raise UserError(f"the evaluation has a total weight of {weight:g}: there is nothing to take the mean of.")
    loss = float(totals.pop("loss")) / weight
    return loss, weight, {name.removeprefix("sum/"): value for name, value in totals.items()}


class _Evaluation:
    """Sums over this rank's batches."""

    def __init__(self, task: Callable[[nn.Module, Any], TaskOutput], device: torch.device) -> None:
        self.task = task
        self.device = device
        self.totals: dict[str, Tensor] = {}

    def forward(
        self, model: nn.Module, batch: Any, autocast: Callable[[], AbstractContextManager[Any]], *, is_counted: bool
    ) -> None:
        with autocast():
            output = self.task(model, batch)
        if is_counted:
            self.add(output)

    def add(self, output: TaskOutput) -> None:
        output = checked_output(output)
        sums = {f"sum/{name}": value for name, value in output.sums.items()}  # one may be named loss or weight too
        parts = {"loss": output.loss_sum, "weight": torch.as_tensor(output.weight, dtype=torch.float64), **sums}
        for name, value in parts.items():
            value = value.detach().to(device=self.device, dtype=torch.float64)
            self.totals[name] = self.totals[name] + value if name in self.totals else value

    def totals_over_ranks(self) -> dict[str, Tensor]:
        return _over_ranks(self.totals, self.device)


class _CoupledEvaluation(_Evaluation):
    """Losses of so many samples together, however they are dealt to ranks and batches."""

    task: CoupledTask

    def __init__(self, task: CoupledTask, device: torch.device) -> None:
        super().__init__(task, device)
        self._embeddings: list[Any] = []

    def forward(
        self, model: nn.Module, batch: Any, autocast: Callable[[], AbstractContextManager[Any]], *, is_counted: bool
    ) -> None:
        with autocast():
            rows = self.task.embed(model, batch)
        if is_counted:
            self._embeddings.append(in_float32(rows))

    def totals_over_ranks(self) -> dict[str, Tensor]:
        form, leaves = self._whole()
        if leaves:
            step = self.task.evaluation_samples or len(leaves[0])
            for parts in zip(*(torch.split(leaf, step) for leaf in leaves), strict=True):
                self.add(self.task.window_loss(rebuilt(form, parts)))
        return {name: value.cpu() for name, value in self.totals.items()}

    def _whole(self) -> tuple[Any, list[Tensor]]:
        """What a nest of embeddings looks like, and its tensors with the rows of all batches and ranks."""
        mine = [leaves_of(rows) for rows in self._embeddings]
        leaves = [torch.cat(parts) for parts in zip(*mine, strict=True)]
        # A rank without a batch doesn't know what embeddings look like.
        form = mapped(self._embeddings[0], lambda leaf: leaf[:0].cpu()) if mine else None
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return form, leaves
        forms: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(forms, form)
        form = next((known for known in forms if known is not None), None)
        if form is None:
            return None, []
        return form, gather_rows(leaves or [leaf.to(self.device) for leaf in leaves_of(form)], dist.group.WORLD)[0]


def _over_ranks(totals: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    if dist.is_initialized() and dist.get_world_size() > 1:
        # A rank without a batch doesn't know the shapes of the task's sums, so those travel first.
        shapes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shapes, {name: tuple(value.shape) for name, value in totals.items()})
        known = max(shapes, key=len)
        if other := [names for names in shapes if names and names != known]:
            raise UserError(
                f"the ranks' sums differ in an evaluation: {known} and {other[0]}. Give the same names and shapes in "
                "each micro-step and on each rank."
            )
        flat = [
            totals.get(name, torch.zeros(shape, device=device, dtype=torch.float64)).reshape(-1)
            for name, shape in known.items()
        ]
        if flat:
            vector = torch.cat(flat)
            dist.all_reduce(vector)
            split = torch.split(vector, [part.numel() for part in flat])
            totals = {name: part.reshape(shape) for (name, shape), part in zip(known.items(), split, strict=True)}
    return {name: value.cpu() for name, value in totals.items()}
