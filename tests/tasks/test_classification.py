import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distaccum.config.components import ClassificationConfig
from distaccum.config.instantiate import build
from distaccum.errors import UserError
from distaccum.tasks import Classification, Task

LOGITS = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0], [0.0, 0.5, 0.25], [1.0, 0.0, 0.0]])
TARGETS = torch.tensor([0, 1, 2, 0])
IDENTITY = nn.Identity()


def test_sums_and_weight() -> None:
    output = Classification()(IDENTITY, (LOGITS, TARGETS))
    assert torch.allclose(output.loss_sum, 4 * F.cross_entropy(LOGITS, TARGETS))
    assert output.loss_sum.shape == ()
    assert output.weight == 4
    assert isinstance(output.weight, int)
    assert output.sums["accuracy"].item() == 3
    assert not output.sums["accuracy"].requires_grad


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_micro_batches_add_up(label_smoothing: float) -> None:
    task = Classification(label_smoothing)
    logits = LOGITS.double().requires_grad_()
    whole = task(IDENTITY, (logits, TARGETS))
    parts = [task(IDENTITY, batch) for batch in zip(logits.split([1, 3]), TARGETS.split([1, 3]), strict=True)]
    total = parts[0].loss_sum + parts[1].loss_sum
    (expected,) = torch.autograd.grad(whole.loss_sum, logits)
    (gradient,) = torch.autograd.grad(total, logits)
    assert torch.allclose(gradient, expected, rtol=1e-14, atol=0)
    assert sum(part.weight for part in parts) == whole.weight
    assert sum(part.sums["accuracy"] for part in parts) == whole.sums["accuracy"]


def test_label_smoothing() -> None:
    expected = F.cross_entropy(LOGITS, TARGETS, reduction="sum", label_smoothing=0.2)
    assert torch.allclose(Classification(0.2)(IDENTITY, (LOGITS, TARGETS)).loss_sum, expected)


WEIGHTS = [0.5, 3.0, 1.25]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_class_weights_are_those_of_torch_over_the_whole_window(label_smoothing: float) -> None:
    task = Classification(label_smoothing, WEIGHTS)
    logits = LOGITS.double()
    parts = [task(IDENTITY, batch) for batch in zip(logits.split([1, 3]), TARGETS.split([1, 3]), strict=True)]
    weight = parts[0].weight + parts[1].weight
    mean = (parts[0].loss_sum + parts[1].loss_sum) / weight
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    expected = F.cross_entropy(logits, TARGETS, weights, label_smoothing=label_smoothing)
    assert mean.item() == pytest.approx(expected.item(), rel=1e-14)
    assert weight.item() == weights[TARGETS].sum().item()
    assert (parts[0].loss_sum / parts[0].weight + parts[1].loss_sum / parts[1].weight).item() / 2 != mean.item()


def test_accuracy_does_not_know_of_class_weights() -> None:
    output = Classification(class_weights=WEIGHTS)(IDENTITY, (LOGITS, TARGETS))
    sums = {name: value.double() for name, value in output.sums.items()}
    assert Classification().metrics(sums, float(output.weight)) == {"accuracy": 0.75}


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
def test_soft_targets_of_one_class_are_that_class(label_smoothing: float, class_weights: list[float] | None) -> None:
    task = Classification(label_smoothing, class_weights)
    logits = LOGITS.double()
    hard, soft = task(IDENTITY, (logits, TARGETS)), task(IDENTITY, (logits, F.one_hot(TARGETS, 3).float()))
    assert soft.loss_sum.item() == pytest.approx(hard.loss_sum.item(), rel=1e-14)
    assert float(soft.weight) == float(hard.weight)
    assert {name: float(value) for name, value in soft.sums.items()} == {
        name: float(value) for name, value in hard.sums.items()
    }


def test_a_soft_target_is_the_mean_of_its_classes() -> None:
    task = Classification(0.1, WEIGHTS)
    logits, half = LOGITS.double()[:2], torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.5, 0.5]])
    soft = task(IDENTITY, (logits, half))
    of = [[task(IDENTITY, (logits[row : row + 1], torch.tensor([c]))) for c in range(3)] for row in range(2)]
    for what in ("loss_sum", "weight"):
        expected = sum(float(half[row, c]) * float(getattr(of[row][c], what)) for row in range(2) for c in range(3))
        assert float(getattr(soft, what)) == pytest.approx(expected, rel=1e-14)
    assert float(soft.sums["accuracy"]) == 0.25 + 0.5


@pytest.mark.parametrize("class_weights", [[1, -1, 1], [0, 0, 0], [1, float("nan"), 1], [float("inf"), 1, 1], []])
def test_impossible_class_weights(class_weights: list[float]) -> None:
    with pytest.raises(UserError, match="class_weights"):
        Classification(class_weights=class_weights)


def test_class_weights_of_another_number_of_classes() -> None:
    with pytest.raises(UserError, match="class_weights has 2 numbers, and the model has 3 outputs"):
        Classification(class_weights=[1, 2])(IDENTITY, (LOGITS, TARGETS))


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_the_loss_is_in_float32_at_least(given: torch.dtype, computed: torch.dtype) -> None:
    assert Classification()(IDENTITY, (LOGITS.to(given), TARGETS)).loss_sum.dtype == computed


def test_a_large_micro_batch_in_half_precision_does_not_overflow() -> None:
    logits = torch.tensor([0.0, 100.0], dtype=torch.float16).repeat(2000, 1)
    loss_sum = Classification()(IDENTITY, (logits, torch.zeros(2000, dtype=torch.int64))).loss_sum
    assert loss_sum.item() == pytest.approx(200_000)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_integers_of_any_size(dtype: torch.dtype) -> None:
    output = Classification()(IDENTITY, (LOGITS, TARGETS.to(dtype)))
    assert torch.allclose(output.loss_sum, 4 * F.cross_entropy(LOGITS, TARGETS))
    assert output.sums["accuracy"].item() == 3


def test_metrics() -> None:
    task = Classification()
    assert isinstance(task, Task)
    assert task.metrics({"accuracy": torch.tensor(3.0, dtype=torch.float64)}, 4.0) == {"accuracy": 0.75}


@pytest.mark.parametrize("target", [3, -1, -100])
def test_a_target_outside_the_classes(target: int) -> None:
    with pytest.raises(UserError, match=rf"model has 3 outputs.*{target}"):
        Classification()(IDENTITY, (LOGITS, torch.tensor([0, 1, target, 0])))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((LOGITS, "a name"), r"inputs and targets.* got 2 fields \(Tensor, str\)"),
        ({"inputs": LOGITS, "classes": TARGETS}, "inputs and targets.* got a dict of inputs, classes"),
        ({"labels": TARGETS}, "inputs and targets.* got a dict of labels"),
        (LOGITS[:2], "inputs and targets.* got a Tensor"),
        ((LOGITS, 3), r"got 2 fields \(Tensor, int\)"),
        ((LOGITS, TARGETS.float()), "integers as targets, and got torch.float32"),
        ((LOGITS, TARGETS.bool()), "integers as targets, and got torch.bool"),
        ((LOGITS, TARGETS[:, None]), r"logits \[4, 3\] and targets \[4, 1\]"),
        ((LOGITS, TARGETS[:2]), r"logits \[4, 3\] and targets \[2\]"),
        ((LOGITS[None], TARGETS), r"logits \[1, 4, 3\] and targets \[4\]"),
    ],
)
def test_batches_of_another_form(batch: object, message: str) -> None:
    with pytest.raises(UserError, match=f"Classification needs .*{message}"):
        Classification()(IDENTITY, batch)


@pytest.mark.parametrize("label_smoothing", [-0.1, 1.0])
def test_impossible_label_smoothing(label_smoothing: float) -> None:
    with pytest.raises(UserError, match=f"label_smoothing={label_smoothing}"):
        Classification(label_smoothing)


def test_the_configured_section_fits() -> None:
    task = build(ClassificationConfig(label_smoothing=0.1), "task")
    assert isinstance(task, Classification)
    assert task.label_smoothing == 0.1


def test_the_model_gets_the_inputs_and_a_gradient() -> None:
    model = nn.Linear(5, 3)
    inputs: Tensor = torch.randn(4, 5)
    Classification()(model, (inputs, TARGETS)).loss_sum.backward()
    assert model.weight.grad is not None
