from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distaccum.config.components import SegmentationConfig
from distaccum.config.instantiate import build
from distaccum.errors import UserError
from distaccum.tasks import Segmentation

IGNORED = 255


def _batch(samples: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(samples, 3, 5, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 3, (samples, 5, 6), generator=generator)
    targets[torch.rand(samples, 5, 6, generator=generator) < 0.3] = IGNORED
    return logits, targets


def test_the_loss_is_a_sum_over_valid_pixels() -> None:
    logits, targets = _batch()
    output = Segmentation()(nn.Identity(), (logits, targets))
    chosen = logits.permute(0, 2, 3, 1)[targets != IGNORED].log_softmax(-1)
    wanted = -chosen[range(len(chosen)), targets[targets != IGNORED]].sum()
    assert output.loss_sum.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert int(output.weight) == int((targets != IGNORED).sum())


def test_the_metrics_are_those_of_all_pixels_however_they_are_dealt() -> None:
    """Against the definition, and against the mean of parts, which is another number."""
    logits, targets = _batch()
    task = Segmentation()
    outputs = [task(nn.Identity(), (logits[i : i + 1], targets[i : i + 1])) for i in range(4)]
    sums = {name: sum(output.sums[name] for output in outputs).double() for name in outputs[0].sums}
    weight = float(sum(output.weight for output in outputs))
    found = task.metrics(sums, weight)
    predicted, valid = logits.argmax(dim=1), targets != IGNORED
    ratios = [
        float(((predicted == c) & (targets == c)).sum() / (((predicted == c) | (targets == c)) & valid).sum())
        for c in range(3)
    ]
    assert found["mean_iou"] == pytest.approx(sum(ratios) / 3, rel=1e-6)
    assert found["accuracy"] == pytest.approx(float((predicted == targets).sum()) / weight)
    parts = [task.metrics({n: v.double() for n, v in o.sums.items()}, float(o.weight))["mean_iou"] for o in outputs]
    assert abs(sum(parts) / 4 - found["mean_iou"]) > 1e-3


def test_class_weights_are_those_of_torch_over_all_pixels() -> None:
    logits, targets = _batch()
    weights = [0.5, 3.0, 1.25]
    task = Segmentation(class_weights=weights)
    outputs = [task(nn.Identity(), (logits[part], targets[part])) for part in (slice(0, 1), slice(1, 4))]
    weight = sum(float(output.weight) for output in outputs)
    mean = sum(float(output.loss_sum.detach()) for output in outputs) / weight
    expected = F.cross_entropy(logits, targets, torch.tensor(weights, dtype=torch.float64), ignore_index=IGNORED)
    assert mean == pytest.approx(float(expected.detach()), rel=1e-14)
    sums = {name: (outputs[0].sums[name] + outputs[1].sums[name]).double() for name in outputs[0].sums}
    plain = Segmentation()(nn.Identity(), (logits, targets))
    wanted = Segmentation().metrics({n: v.double() for n, v in plain.sums.items()}, float(plain.weight))
    assert task.metrics(sums, weight) == wanted


def test_a_class_that_is_nowhere_does_not_count() -> None:
    logits = torch.zeros(1, 3, 2, 2, requires_grad=True) + torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1)
    output = Segmentation()(nn.Identity(), (logits, torch.tensor([[[0, 0], [0, 1]]])))
    found = Segmentation().metrics({name: value.double() for name, value in output.sums.items()}, 4.0)
    assert found["mean_iou"] == pytest.approx((3 / 4 + 0) / 2)


def test_a_micro_batch_of_ignored_pixels_only() -> None:
    logits, targets = _batch()
    output = Segmentation()(nn.Identity(), (logits, torch.full_like(targets, IGNORED)))
    assert float(output.loss_sum.detach()) == float(output.weight) == 0
    output.loss_sum.backward()


def test_the_configured_section_fits() -> None:
    assert isinstance(build(SegmentationConfig(), "task"), Segmentation)


@pytest.mark.parametrize(
    ("logits", "targets"), [((2, 3, 4, 4), (2, 4)), ((2, 3), (2, 4, 4)), ((2, 3, 4, 4), (2, 4, 5))]
)
def test_other_shapes(logits: tuple[int, ...], targets: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"needs logits \[samples, classes, height, width\]"):
        Segmentation()(nn.Identity(), (torch.zeros(logits), torch.zeros(targets, dtype=torch.int64)))
