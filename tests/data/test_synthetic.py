import pytest
import torch
from torch import Tensor

from distaccum.data import Synthetic
from distaccum.errors import UserError


def stacked(data: Synthetic) -> tuple[Tensor, Tensor]:
    samples = [data[index] for index in range(len(data))]
    return torch.stack([inputs for inputs, _ in samples]), torch.tensor([label for _, label in samples])


def make(split: str, num_samples: int = 40) -> Synthetic:
    return Synthetic(split, num_samples=num_samples, input_shape=[3, 4, 4], num_classes=5)


def test_samples() -> None:
    data = make("train")
    inputs, label = data[3]
    assert inputs.shape == data.input_shape == (3, 4, 4)
    assert inputs.dtype == torch.float32
    assert label == 3
    assert data.num_classes == 5


@pytest.mark.parametrize(("num_samples", "expected"), [(1, 1), (3, 1), (4, 1), (41, 10)])
def test_the_evaluation_has_a_quarter(num_samples: int, expected: int) -> None:
    assert len(make("train", num_samples)) == num_samples
    assert len(make("evaluation", num_samples)) == expected


def test_a_sample_depends_on_its_split_and_index_alone() -> None:
    one, other = make("train"), make("train", num_samples=1000)
    torch.manual_seed(5)
    expected = one[7][0]
    torch.manual_seed(6)
    other[8]
    assert torch.equal(other[7][0], expected)


def test_reading_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    make("train")[0]
    assert torch.equal(state, torch.get_rng_state())


def test_no_two_samples_are_alike() -> None:
    inputs = torch.cat([stacked(make(split))[0] for split in ("train", "evaluation")])
    assert len(inputs.flatten(1).unique(dim=0)) == len(inputs) == 50


def test_the_noise_is_centred_and_uncorrelated() -> None:
    inputs, labels = stacked(make("train", num_samples=2000))
    flat = inputs.flatten(1)
    assert (flat[labels == 0].std(dim=0) - 1).abs().max() < 0.2
    neighbours = flat[0::5][:-1] - flat[5::5]  # same class: the difference of two noises
    assert abs(neighbours.std().item() - 2**0.5) < 0.05


def test_classes_can_be_told_apart() -> None:
    inputs, labels = stacked(make("train", num_samples=400))
    centres = torch.stack([inputs[labels == label].mean(dim=0) for label in range(5)]).flatten(1)
    inputs, labels = stacked(make("evaluation", num_samples=400))
    nearest = torch.cdist(inputs.flatten(1), centres).argmin(dim=1)
    assert (nearest == labels).float().mean() > 0.95


def test_indices_outside_are_refused() -> None:
    data = make("train")
    with pytest.raises(IndexError):
        data[40]
    assert torch.equal(data[-1][0], data[39][0])


@pytest.mark.parametrize(
    "change", [{"num_samples": 0}, {"num_classes": 0}, {"input_shape": [3, 0]}, {"split": "validation"}]
)
def test_impossible_arguments(change: dict[str, object]) -> None:
    arguments: dict[str, object] = {"split": "train", "num_samples": 4, "input_shape": [2], "num_classes": 2}
    with pytest.raises(UserError, match="Synthetic: "):
        Synthetic(**{**arguments, **change})  # type: ignore[arg-type]
