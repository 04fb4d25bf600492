from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distaccum.config.components import ContrastiveConfig
from distaccum.config.instantiate import build
from distaccum.errors import UserError
from distaccum.tasks import Contrastive


def _views(samples: int = 5) -> torch.Tensor:
    return torch.randn(samples, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_the_loss_is_that_of_the_paper() -> None:
    """Chen et al. 2020, equation 1, by loops."""
    views, temperature = _views(), 0.3
    task = Contrastive(temperature)
    rows = task.embed(nn.Identity(), views)["views"]
    flat = [(sample, rows[sample, view]) for sample in range(5) for view in range(2)]
    total = 0.0
    for i, (sample, row) in enumerate(flat):
        others = [(j, other) for j, other in enumerate(flat) if j != i]
        similar = {j: float(torch.exp(F.cosine_similarity(row, other[1], dim=0) / temperature)) for j, other in others}
        (positive,) = (similar[j] for j, other in others if other[0] == sample)
        total -= float(torch.log(torch.tensor(positive / sum(similar.values()), dtype=torch.float64)))
    found = task.window_loss({"views": rows})
    assert float(found.loss_sum) == pytest.approx(total, rel=1e-12)
    assert found.weight == 10


def test_its_metrics() -> None:
    directions = torch.eye(3, dtype=torch.float64)
    views = torch.stack([directions, directions], dim=1)
    views[2, 1] = directions[0]  # one view looks like another sample
    task = Contrastive()
    assert int(task.window_loss({"views": views}).sums["retrieval"]) < 6
    close = torch.tensor([[1.0, 0, 0], [0.9, 0.1, 0], [0, 0, 1], [0, 0.1, 0.9]], dtype=torch.float64)
    same = task.window_loss({"views": torch.stack([close, close], dim=1), "labels": torch.tensor([1, 1, 2, 3])})
    assert float(same.sums["neighbour_accuracy"]) / same.weight == 0.5
    assert "neighbour_accuracy" not in task.window_loss({"views": views}).sums


def test_without_temperature_embeddings_stay_as_they_are() -> None:
    views = 3 * _views()
    assert torch.equal(Contrastive(temperature=None).embed(nn.Identity(), views)["views"], views)


def test_the_configured_section_fits() -> None:
    assert isinstance(build(ContrastiveConfig(), "task"), Contrastive)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(4, 3, 5), r"two views of each sample, \[samples, 2, …\], and got \[4, 3, 5\]"),
        ((torch.zeros(4, 2, 5), [1]), "micro-batches of views, or of views and labels"),
        ((torch.zeros(4, 2, 5),) * 3, "got 3 fields"),
        (torch.zeros(4, 2, 5, 6), r"a vector for each view, \[8, size\], and the model gave \[8, 5, 6\]"),
    ],
)
def test_other_micro_batches(batch: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Contrastive()(nn.Identity(), batch)


@pytest.mark.parametrize("arguments", [{"temperature": 0.0}, {"evaluation_samples": 1}])
def test_impossible_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"task.{next(iter(arguments))}="):
        Contrastive(**arguments)
