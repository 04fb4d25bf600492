"""Cross-entropies: one class per sample, per token or per pixel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distaccum.accumulation.result import TaskOutput
from distaccum.config.enums import Normalize
from distaccum.errors import UserError
from distaccum.models.ensemble import Ensemble
from distaccum.models.outputs import logits_of
from distaccum.tasks.base import Task
from distaccum.tasks.chunked_loss import loss_in_head
from distaccum.tasks.model_io import as_classes, call_model, inputs_and_targets


class _CrossEntropy(Task):
    """The common part of the three. Raises a `UserError` in a call, for a micro-batch or logits of another form."""

    class_dim: int = 1
    ignore_index = torch.iinfo(torch.int64).min
    """No target is ignored. With torch's default, one of -100 would add nothing to the loss and still count."""
    label_smoothing = 0.0
    class_weights: Sequence[float] | None = None
    _logits_form: tuple[str, ...]
    _targets_form: tuple[str, ...]
    _takes_soft_targets = False

    def _computed(self, model: nn.Module, batch: Any, reduction: str = "sum") -> tuple[Tensor, Tensor, Tensor, int]:
        """Returns the summed loss in float32 at least, predicted classes `[N]`, targets, number of classes.

        Args:
            reduction: `none` for the loss of each target `[N]` in place of the sum.
        """
        name = type(self).__name__
        inputs, targets = self._inputs_and_targets(batch)
        is_soft = self._takes_soft_targets and targets.is_floating_point() and targets.dim() == len(self._logits_form)
        if not is_soft:
            targets = as_classes(targets, name)
        logits = logits_of(call_model(model, inputs))
        if is_soft:
            fits = logits.shape == targets.shape
        else:
            fits = (logits.dim(), targets.dim()) == (len(self._logits_form), len(self._targets_form))
            fits = fits and logits.select(self.class_dim, 0).shape == targets.shape
        if not fits:
            raise UserError(
                f"{name} needs logits [{', '.join(self._logits_form)}] and targets [{', '.join(self._targets_form)}], "
                f"and got logits {list(logits.shape)} and targets {list(targets.shape)}."
            )
        rows = logits.movedim(self.class_dim, -1).flatten(0, -2)
        predicted = rows.detach().argmax(dim=-1)
        if rows.dtype in (torch.float16, torch.bfloat16):
            rows = rows.float()  # a sum over many elements overflows float16 and loses digits in bfloat16
        try:
            loss_sum = F.cross_entropy(
                rows,
                targets.to(rows.dtype) if is_soft else targets.flatten(),
                self._weights_beside(rows, rows.shape[-1]),
                reduction=reduction,
                ignore_index=self.ignore_index,
                label_smoothing=self.label_smoothing,
            )
        except IndexError as error:  # on CUDA it is the device that stops: looking at targets would make the host wait
            raise UserError(
                f"{name}: the model has {rows.shape[-1]} outputs, which does not cover all targets ({error}) "
                "They must be integers from 0 to one below the number of outputs, often model.num_classes."
            ) from error
        return loss_sum, predicted if is_soft else predicted.view_as(targets), targets, rows.shape[-1]

    def _inputs_and_targets(self, batch: Any) -> tuple[Any, Tensor]:
        return inputs_and_targets(batch, type(self).__name__)

    def _weights_beside(self, like: Tensor, classes: int) -> Tensor | None:
        """Returns the class weights `[C]` on the device and in the format of another tensor."""
        if self.class_weights is None:
            return None
        if len(self.class_weights) != classes:
            raise UserError(
                f"task.class_weights has {len(self.class_weights)} numbers, and the model has {classes} outputs: give "
                "one number for each class, in the order of the classes."
            )
        form = like.device, like.dtype
        if form not in self._weights:  # a copy to the device makes the host wait, so there is one
            self._weights[form] = torch.tensor(self.class_weights, device=form[0], dtype=form[1])
        return self._weights[form]

    def _keep_class_weights(self, class_weights: Sequence[float] | None) -> None:
        """Sets the class weights.

        Raises:
            UserError: one is negative or no number, or all are 0.
        """
        weights = None if class_weights is None else list(class_weights)
        if weights is not None and not (all(0 <= weight < math.inf for weight in weights) and any(weights)):
            raise UserError(f"task.class_weights={weights} must be numbers from 0 up, one for each class, not all 0.")
        self.class_weights = weights
        self._weights: dict[tuple[torch.device, torch.dtype], Tensor] = {}


class Classification(_CrossEntropy):
    """Cross-entropy over classes. Weight: samples, or Σ class weights of their targets. Metric: `accuracy`.

    A micro-batch is `(inputs, targets)`, or a mapping with both (see `distaccum.tasks.model_io`); the model's logits
    are `[B, C]`. The targets are integers `[B]`, or floating-point numbers `[B, C]`, the probability of each class,
    which add up to 1 (`distaccum.data.Mixed` makes such). A sample counts in `accuracy` as much as its target gives to
    the predicted class; class weights don't enter there.

    Args:
        label_smoothing: probability mass spread over all classes, in [0, 1).
        class_weights: a number for each class. Then the loss of a window is
            Σ_i Σ_c q'_ic w_c (-log p_ic) / Σ_i Σ_c q_ic w_c, where q are the targets and q' the smoothed ones: that of
            `torch.nn.CrossEntropyLoss(weight=…)` over the whole window, where targets are integers. (With
            probabilities, torch divides by the number of samples, so that a rare class would change the step's size.)

    Raises:
        UserError: an impossible argument; and from a call, a micro-batch or logits of another form.
    """

    _logits_form, _targets_form = ("samples", "classes"), ("samples",)
    _takes_soft_targets = True

    def __init__(self, label_smoothing: float = 0.0, class_weights: Sequence[float] | None = None) -> None:
        if not 0 <= label_smoothing < 1:
            raise UserError(f"task.label_smoothing={label_smoothing} must lie in [0, 1).")
        self.label_smoothing = label_smoothing
        self._keep_class_weights(class_weights)

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        loss_sum, predicted, targets, classes = self._computed(model, batch)
        is_soft = targets.dim() > 1
        correct = targets.gather(1, predicted[:, None]) if is_soft else predicted == targets
        sums = {"accuracy": correct.sum()}
        if self.class_weights is None:
            return TaskOutput(loss_sum=loss_sum, weight=len(targets), sums=sums)
        weights = self._weights_beside(loss_sum, classes)
        assert weights is not None
        weight = (targets.to(weights) @ weights).sum() if is_soft else weights[targets].sum()
        samples = torch.full((), len(targets), device=targets.device)
        return TaskOutput(loss_sum=loss_sum, weight=weight, sums={**sums, "samples": samples})

    def metrics(self, sums: dict[str, Tensor], weight: float) -> dict[str, float]:
        if "samples" not in sums:  # the weight counts them, or a subclass gives sums of its own
            return super().metrics(sums, weight)
        return {"accuracy": float(sums["accuracy"]) / float(sums["samples"])}


class LanguageModeling(_CrossEntropy):
    """Cross-entropy over the next token. Metric: `accuracy`, the share of valid targets predicted.

    A micro-batch is `(inputs, targets)`, both integers `[B, T]`, the targets already one token ahead; the model's
    logits are `[B, T, V]`.

    Args:
        ignore_index: the target of padding, which counts neither in the loss nor in the weight.
        normalize: what the loss is a mean over, in the whole window.
            `tokens`: valid targets, each of which counts alike; a long sample counts more than a short one.
            `sequences`: samples that have a valid target, each with the mean over its own valid targets.
            `samples`: all samples, each with the sum over its valid targets, which is the negative log-likelihood of
            the whole sample.
        chunked_loss: compute logits of some tokens at a time, and the loss and gradients with them, so that those of a
            large vocabulary never exist whole. The model's `get_output_embeddings()` must return its last layer, whose
            outputs it returns as they are: see `distaccum.tasks.loss_in_head`.

    Raises:
        UserError: an impossible argument; and from a call, a micro-batch or logits of another form, or a model that the
            loss can't be computed in chunks of.
    """

    class_dim = -1
    _logits_form, _targets_form = ("samples", "length", "tokens"), ("samples", "length")

    def __init__(self, ignore_index: int = -100, normalize: str = "tokens", chunked_loss: bool = False) -> None:
        if normalize not in list(Normalize):
            raise UserError(f"task.normalize={normalize} is none of {', '.join(Normalize)}.")
        self.ignore_index = ignore_index
        self.normalize = Normalize(normalize)
        self.chunked_loss = chunked_loss

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        # An ensemble's loss is that of several models' logits together.
        in_chunks = self.chunked_loss and not isinstance(model, Ensemble)
        loss_sum, losses, predicted, targets = (self._in_chunks if in_chunks else self._at_once)(model, batch)
        valid = targets != self.ignore_index
        sums = self._sums(losses.detach().sum(), (valid & (predicted == targets)).sum())
        if self.normalize is not Normalize.tokens:
            sums["tokens"] = valid.sum()
        return TaskOutput(loss_sum=loss_sum, weight=self._weight(valid), sums=sums)

    def _weight(self, valid: Tensor) -> Tensor | int:
        """Counts what the loss is a mean over, given which targets `[B, T]` are valid."""
        if self.normalize is Normalize.samples:
            return len(valid)
        # It stays on the device: reading it here would make the host wait.
        return (valid.any(1) if self.normalize is Normalize.sequences else valid).sum()

    def _at_once(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the loss sum, the losses of the targets or their sum, predicted classes, and the targets."""
        by_sequence = self.normalize is Normalize.sequences
        losses, predicted, targets, _ = self._computed(model, batch, "none" if by_sequence else "sum")
        if not by_sequence:
            return losses, losses, predicted, targets
        return (losses.view_as(targets).sum(1) / self._lengths(targets)).sum(), losses, predicted, targets

    def _in_chunks(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the same without having all logits at a time."""
        inputs, targets = self._inputs_and_targets(batch)
        targets = as_classes(targets, type(self).__name__)
        if targets.dim() != 2:
            raise UserError(f"{type(self).__name__} needs targets [samples, length], and got {list(targets.shape)}.")
        weights = None
        if self.normalize is Normalize.sequences:
            weights = self._lengths(targets).double().reciprocal()[:, None].expand_as(targets)
        found = loss_in_head(
            model, lambda: call_model(model, inputs), targets, row_weights=weights, ignore_index=self.ignore_index
        )
        return found.loss_sum, found.losses, found.predicted, targets

    def _lengths(self, targets: Tensor) -> Tensor:
        """Returns the number of valid targets of each sample, 1 where there is none."""
        return (targets != self.ignore_index).sum(1).clamp(min=1)

    def _sums(self, loss: Tensor, correct: Tensor) -> dict[str, Tensor]:
        """Returns the sums that metrics are made of, given the loss of all valid targets and how many are predicted."""
        return {"accuracy": correct}

    def metrics(self, sums: dict[str, Tensor], weight: float) -> dict[str, float]:
        if "tokens" not in sums:  # the weight counts them, or a subclass gives sums of its own
            return super().metrics(sums, weight)
        tokens = float(sums["tokens"])
        return {"accuracy": float(sums["accuracy"]) / tokens if tokens else math.nan}


class Segmentation(_CrossEntropy):
    """Cross-entropy over the class of each pixel. Weight: valid pixels, or Σ class weights of their targets.

    Metrics: `accuracy` over pixels, and `mean_iou`, the mean over classes of intersection / union. Both are made of
    counts, so they are those of all pixels together, whatever the micro-batches and ranks. In `mean_iou`, classes that
    neither the targets nor the predictions have don't count.

    A micro-batch is `(images, targets)`, the targets integers `[B, H, W]`; the model's logits are `[B, C, H, W]`.

    Args:
        ignore_index: the target of pixels that count nowhere.
        class_weights: a number for each class: the loss of a window is that of `torch.nn.CrossEntropyLoss(weight=…)`
            over all its pixels. They don't enter the metrics.

    Raises:
        UserError: an impossible argument; and from a call, a micro-batch or logits of another form.
    """

    _logits_form, _targets_form = ("samples", "classes", "height", "width"), ("samples", "height", "width")

    def __init__(self, ignore_index: int = 255, class_weights: Sequence[float] | None = None) -> None:
        self.ignore_index = ignore_index
        self._keep_class_weights(class_weights)

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        loss_sum, predicted, targets, classes = self._computed(model, batch)
        valid = targets != self.ignore_index
        hits = _counts(targets, valid & (predicted == targets), classes)
        there, claimed = _counts(targets, valid, classes), _counts(predicted, valid, classes)
        sums = {"intersections": hits, "unions": there + claimed - hits}
        weight = valid.sum()  # as above, the number stays on the device
        if self.class_weights is not None:
            weights = self._weights_beside(loss_sum, classes)
            assert weights is not None
            weight = (weights[torch.where(valid, targets, 0)] * valid).sum()
        return TaskOutput(loss_sum=loss_sum, weight=weight, sums=sums)

    def metrics(self, sums: dict[str, Tensor], weight: float) -> dict[str, float]:
        return overlap_metrics(sums["intersections"], sums["unions"])


def overlap_metrics(hits: Tensor, unions: Tensor) -> dict[str, float]:
    """Makes `accuracy` and `mean_iou` of the intersections and unions of each class, `[classes]`."""
    is_there = unions > 0
    pixels = float(hits.sum() + unions.sum()) / 2  # each one is once in the targets and once in the predictions
    accuracy = float(hits.sum()) / pixels if pixels else math.nan
    return {"accuracy": accuracy, "mean_iou": float((hits[is_there] / unions[is_there]).mean())}


def _counts(labels: Tensor, chosen: Tensor, classes: int) -> Tensor:
    """Counts the chosen pixels of each class, `[classes]`."""
    # Not bincount, whose result has a size that the host waits for.
    counts = torch.zeros(classes + 1, dtype=torch.int64, device=labels.device)
    places = torch.where(chosen, labels, classes).flatten()
    return counts.scatter_add_(0, places, torch.ones_like(places))[:classes]
