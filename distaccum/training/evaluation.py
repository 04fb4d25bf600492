"""Evaluates a model exactly, each sample once for any number of ranks; for a run, its weight averages too."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distaccum.accumulation.gradient_caching import in_float32
from distaccum.accumulation.result import MAIN, TaskOutput, checked_output
from distaccum.errors import UserError
from distaccum.loaders import EvaluationLoader
from distaccum.observers import EvaluationRecord
from distaccum.observers.base import RECORDED
from distaccum.runtime.devices import Precision
from distaccum.runtime.heartbeat import Heartbeat
from distaccum.runtime.memory import free_cached_memory, is_out_of_memory
from distaccum.runtime.nested import gather_objects, gather_rows, leaves_of, mapped, rebuilt
from distaccum.runtime.randomness import GlobalStates
from distaccum.strategies import Strategy
from distaccum.tasks import CoupledTask, Task, as_number
from distaccum.training.model import evaluation_mode
from distaccum.training.supervision import DroppedError, Supervision
from distaccum.training.weight_average import WeightAverage

logger = logging.getLogger(__name__)


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
        heartbeat: reports each batch to the other ranks.
        between: called before each batch with False, and with True before the ranks meet at the end; what it raises
            ends the evaluation.

    Returns:
        The mean loss (with terms, Σ coefficient · mean over all of them), the weight of the main loss, and the sums
        (float64 on the CPU). The same on every rank. `evaluated` returns the terms too.

    Raises:
        UserError: the total weight is zero, or memory has run out and batches can't be smaller.
    """
    found = evaluated(model, task, batches, device=device, autocast=autocast, heartbeat=heartbeat, between=between)
    return found.loss, found.weight, found.sums


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """Result of an evaluation, the same on every rank."""

    loss: float
    """Mean loss; with terms, Σ coefficient · mean over all of them."""
    weight: float
    """Total weight of the main loss."""
    sums: dict[str, Tensor]
    """Float64, on the CPU."""
    terms: dict[str, float]
    """Mean of each loss by name, `main` first; 0 of one that nothing contributed to. Empty without terms."""


def evaluated(
    model: nn.Module,
    task: Callable[[nn.Module, Any], TaskOutput],
    batches: Iterable[Any],
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    heartbeat: Heartbeat | None = None,
    between: Callable[[bool], None] = lambda is_over: None,
) -> Evaluated:
    """Makes the evaluation of `evaluate_model`, and returns the mean of each loss too."""
    doing = (heartbeat or Heartbeat(0, 1)).doing
    while True:
        evaluation = _CoupledEvaluation(task, device) if isinstance(task, CoupledTask) else _Evaluation(task, device)
        try:
            with evaluation_mode(model), torch.no_grad():
                for number, batch in enumerate(batches):
                    between(False)
                    doing("forward of an evaluation", micro_step=number + 1)
                    is_counted = not isinstance(batches, EvaluationLoader) or batches.size(number) > 0
                    with autocast():
                        output = evaluation.compute(model, batch)
                    if is_counted:
                        evaluation.add(output)
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
    return _means(totals)


def _means(totals: dict[str, Tensor]) -> Evaluated:
    """Divides the sums of each loss by its weight.

    Raises:
        UserError: there is nothing to take a mean of.
    """
    weight = float(totals.get("weight", 0.0))
    of_terms = {name.removeprefix("term/"): value.tolist() for name, value in totals.items() if name[:5] == "term/"}
    if weight <= 0 and not any(term_weight > 0 for _, term_weight, _ in of_terms.values()):
        raise UserError(f"the evaluation has a total weight of {weight:g}: there is nothing to take the mean of.")
    loss = float(totals["loss"]) / (weight or 1.0)
    terms = {MAIN: loss} if of_terms else {}
    for name, (loss_sum, term_weight, scaled_sum) in of_terms.items():
        terms[name] = loss_sum / (term_weight or 1.0)
        loss += scaled_sum / (term_weight or 1.0)
    sums = {name.removeprefix("sum/"): value for name, value in totals.items() if name[:4] == "sum/"}
    return Evaluated(loss=loss, weight=weight, sums=sums, terms=terms)


@dataclass
class _Evaluation:
    """The sums over this rank's batches."""

    task: Any
    device: torch.device
    totals: dict[str, Tensor] = field(default_factory=dict)

    def compute(self, model: nn.Module, batch: Any) -> Any:
        return self.task(model, batch)

    def add(self, output: Any) -> None:
        output = checked_output(output)
        sums = {f"sum/{name}": value for name, value in output.sums.items()}  # one may be named loss or weight too
        parts = {"loss": output.loss_sum, "weight": torch.as_tensor(output.weight, dtype=torch.float64), **sums}
        for name, term in output.terms.items():
            loss_sum = term.loss_sum.to(self.device, torch.float64)
            term_weight = torch.as_tensor(term.weight, dtype=torch.float64, device=self.device)
            parts[f"term/{name}"] = torch.stack([loss_sum, term_weight, term.coefficient * loss_sum])
        for name, value in parts.items():
            value = value.detach().to(device=self.device, dtype=torch.float64)
            self.totals[name] = self.totals[name] + value if name in self.totals else value

    def totals_over_ranks(self) -> dict[str, Tensor]:
        # A rank without a batch doesn't know the shapes of the task's sums, so those are exchanged first.
        shapes = gather_objects({name: tuple(value.shape) for name, value in self.totals.items()}, dist.group.WORLD)
        terms = {name: shape for names in shapes for name, shape in names.items() if name.startswith("term/")}
        shapes = [{**names, **terms} if names else names for names in shapes]  # a rank may have nothing of a term
        known = max(shapes, key=len)
        if other := [names for names in shapes if names and names != known]:
            raise UserError(
                f"the ranks' sums differ in an evaluation: {known} and {other[0]}. Give the same names and shapes "
                "in each micro-step and on each rank."
            )
        totals = {name: torch.zeros(shape, dtype=torch.float64, device=self.device) for name, shape in known.items()}
        for name, total in totals.items():
            total += self.totals.get(name, 0.0)
            if len(shapes) > 1:
                dist.all_reduce(total)
        return {name: total.cpu() for name, total in totals.items()}


@dataclass
class _CoupledEvaluation(_Evaluation):
    """The losses of `evaluation_samples` samples together, however they are dealt to ranks and batches."""

    embeddings: list[Any] = field(default_factory=list)

    def compute(self, model: nn.Module, batch: Any) -> Any:
        return self.task.embed(model, batch)

    def add(self, output: Any) -> None:
        self.embeddings.append(in_float32(output))

    def totals_over_ranks(self) -> dict[str, Tensor]:
        form, leaves = self._whole()
        if leaves:
            step = self.task.evaluation_samples or len(leaves[0])
            for parts in zip(*(torch.split(leaf, step) for leaf in leaves), strict=True):
                super().add(self.task.window_loss(rebuilt(form, parts)))
        return {name: value.cpu() for name, value in self.totals.items()}

    def _whole(self) -> tuple[Any, list[Tensor]]:
        """Returns an empty nest of embeddings, and its tensors with the rows of all batches and ranks."""
        mine = [leaves_of(rows) for rows in self.embeddings]
        leaves = [torch.cat(parts) for parts in zip(*mine, strict=True)]
        # A rank without a batch doesn't know what embeddings look like.
        form = mapped(self.embeddings[0], lambda leaf: leaf[:0].cpu()) if mine else None
        group = dist.group.WORLD
        form = next((known for known in gather_objects(form, group) if known is not None), None)
        if form is None:
            return None, []
        return form, gather_rows(leaves or [leaf.to(self.device) for leaf in leaves_of(form)], group)[0]


@dataclass(kw_only=True, slots=True)
class Evaluator:
    """Evaluates a placed model, exactly over all ranks.

    Attributes:
        task: as the updater's.
        loader: of the evaluation data.
        precision: the format to compute in.
        supervision: drops the evaluation once a signal has come.
        data: the evaluation data, whose `reference_losses` are reported beside the metrics.
        averages: of the weights, evaluated too as soon as they have begun; their metrics are `ema/loss` and so on.
    """

    strategy: Strategy
    task: Callable[[nn.Module, Any], TaskOutput]
    loader: EvaluationLoader
    precision: Precision
    supervision: Supervision
    data: Any = None
    averages: Sequence[WeightAverage] = ()

    def evaluate(self, update: int, epoch: int) -> EvaluationRecord:
        """Evaluates after an update. All ranks call it, and see the same metrics.

        Raises:
            DroppedError: a signal has come, and all is as it was before.
        """
        started = time.perf_counter()
        states = GlobalStates.now(self.strategy.device)
        sample = None
        try:
            metrics = self._metrics(update)
            if hasattr(self.task, "sample"):
                with evaluation_mode(self.strategy.module), torch.no_grad(), self.precision.autocast():
                    sample = self.task.sample(self.strategy.module, self.data)
            for average in self.averages:
                if average.has_begun:
                    with average.in_the_model():
                        found = self._metrics(update)
                    metrics |= {f"{average.name}/{name}": value for name, value in found.items()}
        except DroppedError:
            states.put_back()
            logger.info("the evaluation after update %d is left for later", update)
            raise
        seconds = time.perf_counter() - started
        references = getattr(self.data, "reference_losses", None) or {}
        return EvaluationRecord(
            update=update, epoch=epoch, metrics=metrics, references=references, sample=sample, seconds=seconds
        )

    def to_choose_by(self, metrics: dict[str, float]) -> dict[str, float]:
        """Returns metrics to compare evaluations by: those given, and NaN for averages that have not begun."""
        later = {
            f"{average.name}/{name}": math.nan for average in self.averages if not average.has_begun for name in metrics
        }
        return later | metrics

    def _metrics(self, update: int) -> dict[str, float]:
        self.strategy.share_buffers()
        found = evaluated(
            self.strategy.module,
            self.task,
            self.loader,
            device=self.strategy.device,
            autocast=self.precision.autocast,
            heartbeat=self.supervision.heartbeat,
            between=lambda is_over: self.supervision.check_evaluation(update, is_over=is_over),
        )
        return evaluation_metrics(self.task, found)


def evaluation_metrics(task: Any, found: Evaluated) -> dict[str, float]:
    """Returns the metrics of an evaluation by name: `loss`, `loss/NAME` of each loss if there are several, the task's.

    Raises:
        UserError: as `metrics_of`.
    """
    terms = {f"loss/{name}": mean for name, mean in found.terms.items()}
    return {"loss": found.loss, **terms, **metrics_of(task, found.sums, found.weight)}


def metrics_of(task: Any, sums: dict[str, Tensor], weight: float) -> dict[str, float]:
    """Returns the task's metrics over a window or an evaluation, made of its sums.

    Raises:
        UserError: one is no number, or is named as what the run itself records (`loss`, `lr`, …).
    """
    if not weight:
        return dict.fromkeys(sums, math.nan)
    found = task.metrics(sums, weight) if hasattr(task, "metrics") else Task.metrics(task, sums, weight)
    if not isinstance(found, Mapping):
        raise UserError(f"the task's metrics() returned a {type(found).__name__}, not numbers by name.")
    if taken := found.keys() & set(RECORDED):
        raise UserError(f"the task's metric {min(taken)} would hide the run's own {min(taken)}: give it another name.")
    return {name: as_number(value, f"the task's metric {name}") for name, value in found.items()}
