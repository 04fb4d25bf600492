"""Contrastive learning: two views of a sample belong together, and apart from all other samples of the window."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distaccum.accumulation.result import TaskOutput
from distaccum.errors import UserError
from distaccum.tasks.base import CoupledTask


class Contrastive(CoupledTask):
    """NT-Xent, the loss of SimCLR (Chen et al. 2020), over the whole window. Weight: views, two for each sample.

    Each view has to find the other view of its sample among all other views of the window, by a softmax over cosine
    similarities. Metrics: `retrieval`, the share of views that do; and with labels `neighbour_accuracy`, the share of
    first views whose nearest first view of another sample has the same label.

    A micro-batch is `views` or `(views, labels)`: views `[B, 2, …]`, labels integers `[B]`; the model gives a vector
    for each view, `[2 B, D]` of `[2 B, …]`.

    Args:
        temperature: divides the cosine similarities. None if the model's embeddings have their final length already, as
            with a learnable temperature: similarities are then plain inner products.
        evaluation_samples: see `CoupledTask`.

    Raises:
        UserError: an impossible argument; and from a call, a micro-batch or embeddings of another form.
    """

    def __init__(self, temperature: float | None = 0.2, evaluation_samples: int | None = 256) -> None:
        if temperature is not None and not temperature > 0:
            raise UserError(f"task.temperature={temperature} must be greater than 0, or null.")
        if evaluation_samples is not None and evaluation_samples < 2:
            raise UserError(
                f"task.evaluation_samples={evaluation_samples} is impossible: a contrastive loss needs two samples."
            )
        self.temperature = temperature
        self.evaluation_samples = evaluation_samples

    def embed(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        views, labels = _views_and_labels(batch)
        vectors = model(views.flatten(0, 1))
        if vectors.dim() != 2 or len(vectors) != 2 * len(views):
            raise UserError(
                f"Contrastive needs a vector for each view, [{2 * len(views)}, size], and the model gave "
                f"{list(vectors.shape)}."
            )
        if self.temperature is not None:
            vectors = F.normalize(vectors, dim=1)
        found = {"views": vectors.unflatten(0, (-1, 2))}
        return found if labels is None else {**found, "labels": labels}

    def window_loss(self, embeddings: dict[str, Tensor]) -> TaskOutput:
        views = embeddings["views"]
        samples = len(views)
        # All first views, then all second ones: row i belongs to row i + samples.
        flat = views.transpose(0, 1).flatten(0, 1)
        similarities = flat @ flat.T / (self.temperature or 1.0)
        is_self = torch.eye(2 * samples, dtype=torch.bool, device=flat.device)
        logits = similarities.masked_fill(is_self, -torch.inf)
        partners = torch.arange(2 * samples, device=flat.device).roll(samples)
        loss_sum = F.cross_entropy(logits, partners, reduction="sum")
        detached = logits.detach()
        sums = {"retrieval": (detached.argmax(dim=1) == partners).sum()}
        if "labels" in embeddings:
            labels = embeddings["labels"]
            nearest = detached[:samples, :samples].argmax(dim=1)
            sums["neighbour_accuracy"] = 2 * (labels[nearest] == labels).sum()  # of samples, where the weight is views
        return TaskOutput(loss_sum=loss_sum, weight=2 * samples, sums=sums)


def _views_and_labels(batch: Any) -> tuple[Tensor, Tensor | None]:
    fields = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    if not 1 <= len(fields) <= 2 or not all(isinstance(field, Tensor) for field in fields):
        raise UserError(
            f"Contrastive needs micro-batches of views, or of views and labels, and got {len(fields)} fields. Change "
            "the samples of the dataset, set data.collate_fn, or write a task of your own (task=custom)."
        )
    views = fields[0]
    if views.dim() < 3 or views.shape[1] != 2:
        raise UserError(f"Contrastive needs two views of each sample, [samples, 2, …], and got {list(views.shape)}.")
    return views, fields[1] if len(fields) == 2 else None
