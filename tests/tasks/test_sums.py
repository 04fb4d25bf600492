"""Losses of sums over the window, in one process. On ranks: distributed/checks_sums.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distaccum import SumsTask, TaskOutput, UserError
from distaccum.config.components import DiceConfig
from distaccum.config.instantiate import build
from distaccum.tasks import Dice, Segmentation

IGNORED = 255


def _batch(samples: int = 4, *size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = size or (5, 6)
    logits = torch.randn(samples, 3, *size, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 3, (samples, *size), generator=generator)
    targets[torch.rand(samples, *size, generator=generator) < 0.3] = IGNORED
    return logits, targets


def _defined(logits: Tensor, targets: Tensor, index: Any) -> Tensor:
    """1 − the mean over classes of an index of the probabilities and targets of all valid pixels, by a loop."""
    valid = targets != IGNORED
    probabilities = logits.movedim(1, -1)[valid].softmax(-1)
    return 1 - sum(index(probabilities[:, c], (targets[valid] == c).double()) for c in range(3)) / 3


def _dice(p: Tensor, y: Tensor) -> Tensor:
    return (2 * (p * y).sum() + 2e-5) / (p.sum() + y.sum() + 2e-5)


def _iou(p: Tensor, y: Tensor) -> Tensor:
    return ((p * y).sum() + 1e-5) / (p.sum() + y.sum() - (p * y).sum() + 1e-5)


def _tversky(p: Tensor, y: Tensor) -> Tensor:
    hit, false, missed = (p * y).sum(), (p * (1 - y)).sum(), ((1 - p) * y).sum()
    return (hit + 1e-5) / (hit + 0.3 * false + 0.7 * missed + 1e-5)


@pytest.mark.parametrize(
    ("options", "index"),
    [({}, _dice), ({"alpha": 1, "beta": 1}, _iou), ({"alpha": 0.3, "beta": 0.7}, _tversky)],
)
@pytest.mark.parametrize("size", [(5, 6), (3, 4, 2)])
def test_the_loss_is_that_of_the_definition(options: dict[str, float], index: Any, size: tuple[int, ...]) -> None:
    logits, targets = _batch(4, *size)
    output = Dice(**options)(nn.Identity(), (logits, targets))
    wanted = _defined(logits, targets, index)
    assert output.weight == 4
    assert float(output.loss_sum.detach()) == pytest.approx(4 * float(wanted.detach()), rel=1e-12)
    (found,) = torch.autograd.grad(output.loss_sum, logits)
    (gradient,) = torch.autograd.grad(4 * wanted, logits)
    assert torch.allclose(found, gradient, rtol=1e-11, atol=1e-15)


def test_the_cross_entropy_beside_it_is_segmentations() -> None:
    batch = _batch()
    plain, both = (Dice(cross_entropy=c)(nn.Identity(), batch).loss_sum.detach() / 4 for c in (0.0, 0.5))
    output = Segmentation()(nn.Identity(), batch)
    assert float(both - plain) == pytest.approx(0.5 * float(output.loss_sum.detach() / output.weight), rel=1e-12)


def test_the_metrics_are_segmentations() -> None:
    batch = _batch()
    found, wanted = (task(nn.Identity(), batch) for task in (Dice(), Segmentation()))
    sums = [{name: value.double() for name, value in output.sums.items()} for output in (found, wanted)]
    assert Dice().metrics(sums[0], 4.0) == Segmentation().metrics(sums[1], float(wanted.weight))
    assert not any(value.requires_grad for value in found.sums.values())


def test_half_precision_is_summed_in_float32() -> None:
    logits = torch.zeros(1, 2, 300, 300, dtype=torch.float16)
    output = Dice()(nn.Identity(), (logits, torch.zeros(1, 300, 300, dtype=torch.uint8)))
    assert output.loss_sum.dtype == torch.float32
    assert float(output.loss_sum) == pytest.approx(1 - (90_000 / 135_000) / 2, rel=1e-5)


def test_a_class_that_is_ignored_counts_nowhere() -> None:
    """Though the model has an output for it."""
    logits, targets = _batch()
    targets[targets == IGNORED] = 1
    output = Dice(ignore_index=0)(nn.Identity(), (logits, targets))
    valid = targets != 0
    assert int(output.sums["there"].sum()) == int(valid.sum())
    assert float(output.sums["claimed"].sum()) == pytest.approx(float(valid.sum()), rel=1e-12)


def test_pixels_that_are_all_ignored() -> None:
    logits, targets = _batch()
    output = Dice(cross_entropy=1.0)(nn.Identity(), (logits, torch.full_like(targets, IGNORED)))
    output.loss_sum.backward()
    assert float(output.loss_sum.detach()) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -1.0}, r"task\.alpha=-1\.0 and task\.beta=0\.5 must be at least 0"),
        ({"alpha": 0.0, "beta": 0.0}, "not both 0"),
        ({"cross_entropy": float("nan")}, r"task\.cross_entropy=nan must be at least 0"),
        ({"smooth": 0.0}, r"task\.smooth=0\.0 must be greater than 0"),
    ],
)
def test_impossible_arguments(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Dice(**arguments)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(2).long()), r"needs logits \[samples, classes, …\] and targets"),
        ((torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 5).long()), r"targets \[2, 4, 5\]"),
        ((torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4)), r"integers as targets, and got torch\.float32"),
        ((torch.zeros(2, 3, 4, 4), torch.full((2, 4, 4), 3)), "the model has 3 classes, which does not cover all"),
        (torch.zeros(2, 3, 4, 4), "got a Tensor"),
    ],
)
def test_micro_batches_of_another_form(batch: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"Dice.*{message}"):
        Dice()(nn.Identity(), batch)


def test_the_configured_section_fits() -> None:
    task = build(DiceConfig(alpha=1.0, cross_entropy=0.5), "task")
    assert isinstance(task, Dice)
    assert (task.alpha, task.beta, task.cross_entropy, task.ignore_index) == (1.0, 0.5, 0.5, 255)


class _Correlation(SumsTask):
    """1 − the correlation of outputs and targets over the window."""

    def sums(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        x, y = model(batch[0]).squeeze(1), batch[1]
        return {"count": torch.ones_like(y), "x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y}

    def loss(self, sums: Mapping[str, Tensor]) -> Tensor:
        n = sums["count"]
        covariance = n * sums["xy"] - sums["x"] * sums["y"]
        spread = (n * sums["xx"] - sums["x"] ** 2) * (n * sums["yy"] - sums["y"] ** 2)
        return 1 - covariance / spread.sqrt()


def test_any_function_of_sums() -> None:
    inputs, targets = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    model = nn.Linear(4, 1).double()
    output: TaskOutput = _Correlation()(model, (inputs, targets))
    wanted = 1 - torch.corrcoef(torch.stack([model(inputs).squeeze(1), targets]))[0, 1]
    assert float(output.loss_sum.detach()) / float(output.weight) == pytest.approx(float(wanted.detach()), rel=1e-12)
    assert _Correlation().metrics({}, 9.0) == {}
