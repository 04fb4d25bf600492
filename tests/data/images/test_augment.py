"""Augmentation and mixing: what they do, and that a sample of an epoch doesn't depend on how its window is cut."""

from __future__ import annotations

import pickle
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset

from distaccum import WindowLoader
from distaccum.data import Augment, ImageFolder, Mixed, Mixing
from distaccum.data.images.augment import _box
from distaccum.errors import UserError
from distaccum.loaders import LoaderOptions

GRADIENT = Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint32).reshape(30, 40, 3).astype(np.uint8))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(3)


def write_images(root: Path, classes: int = 3, count: int = 6) -> Path:
    generator = np.random.default_rng(0)
    for label in range(classes):
        (root / f"class_{label}").mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 255, (12, 14, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"class_{label}" / f"{number}.png")
    return root


# Augmentation


def test_nothing_asked_for_changes_nothing() -> None:
    square = GRADIENT.resize((8, 8))
    assert Augment()(square, 8) is square


def test_crops_are_of_the_areas_and_ratios_that_are_asked_for() -> None:
    boxes = [_box(400, 300, 0.2, 0.5) for _ in range(300)]
    areas = [(right - left) * (lower - upper) / 120_000 for left, upper, right, lower in boxes]
    ratios = [(right - left) / (lower - upper) for left, upper, right, lower in boxes]
    assert 0.19 < min(areas) < 0.23 < 0.47 < max(areas) < 0.51
    assert 0.74 < min(ratios) < 0.8 < 1.25 < max(ratios) < 1.35
    assert all(0 <= left < right <= 400 and 0 <= upper < lower <= 300 for left, upper, right, lower in boxes)
    assert min(left for left, *_ in boxes) < 20


@pytest.mark.parametrize(("width", "height"), [(1000, 10), (10, 1000), (1, 1), (3, 500)])
def test_crops_of_long_images(width: int, height: int) -> None:
    for _ in range(20):
        left, upper, right, lower = _box(width, height, 0.9, 1.0)
        assert 0 <= left < right <= width
        assert 0 <= upper < lower <= height


def test_flips_and_colours() -> None:
    square = GRADIENT.resize((8, 8))
    flipped = Augment(flip=1.0)(square, 8)
    assert np.array_equal(np.array(flipped), np.array(square)[:, ::-1])
    changed = {tuple(np.array(Augment(colour=0.5)(square, 8)).flatten()) for _ in range(5)}
    assert len(changed) == 5


def test_the_last_transform_is_ones_own() -> None:
    image = Augment(transform=lambda given: given.rotate(90))(GRADIENT.resize((8, 8)), 8)
    assert np.array_equal(np.array(image), np.rot90(np.array(GRADIENT.resize((8, 8)))))
    for wrong in (lambda given: given.resize((4, 4)), lambda given: given.convert("L"), lambda given: np.array(given)):
        with pytest.raises(UserError, match="transform must return an RGB image of 8×8 pixels"):
            Augment(transform=wrong)(GRADIENT.resize((8, 8)), 8)


def test_randaugment() -> None:
    square = GRADIENT.resize((8, 8))
    augment = Augment(crop=[0.5, 1.0], randaugment=9)
    torch.manual_seed(1)
    changed = {tuple(np.array(augment(square, 8)).flatten()) for _ in range(5)}
    assert len(changed) == 5


def test_randaugment_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    with pytest.raises(UserError, match=r"randaugment=9 needs torchvision.*pip install 'distaccum\[vision\]'"):
        Augment(randaugment=9)


@pytest.mark.parametrize(
    "arguments",
    [{"crop": [0.5]}, {"crop": [0.0, 1.0]}, {"crop": [0.9, 0.5]}, {"flip": 1.5}, {"colour": 1.0}, {"randaugment": 31}],
)
def test_impossible_augmentation(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(arguments))):
        Augment(**arguments)


def test_the_evaluation_is_cropped_to_the_middle(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = 255
    Image.fromarray(pixels).save(tmp_path / "a" / "0.png")
    plain = {"image_size": 10, "mean": (0, 0, 0), "std": (1, 1, 1)}
    assert ImageFolder("train", tmp_path, fit="crop", **plain)[0][0].min() == 1
    assert ImageFolder("train", tmp_path, fit="stretch", **plain)[0][0].min() == 0


# Mixing


def images() -> list[tuple[Tensor, int]]:
    """Image `i` has the value `i` in all pixels."""
    return [(torch.full((3, 16, 16), float(index)), index % 4) for index in range(8)]


def test_mixup_is_a_mean_of_two_and_of_their_classes() -> None:
    samples, mixing = images(), Mixing(mixup=1.0)
    for _ in range(30):
        image, target = mixing(samples.__getitem__, 1, 8, 4)
        value = float(image.mean())
        assert image.min() == image.max()
        assert target.dtype == torch.float32
        assert float(target.sum()) == pytest.approx(1)
        if (other := target.nonzero().flatten().tolist()) and len(other) == 2:
            share = float(target[1])
            partners = [
                share + (1 - share) * partner for partner in range(8) if partner % 4 in other and partner % 4 != 1
            ]
            assert min(abs(value - wanted) for wanted in partners) < 1e-5


def test_cutmix_counts_the_pixels_that_are_left() -> None:
    samples, mixing, shares = images(), Mixing(cutmix=1.0), []
    for _ in range(30):
        image, target = mixing(samples.__getitem__, 1, 8, 4)
        assert float(target[1]) >= float((image == 1).float().mean()) - 1e-6
        shares.append(float(target[1]))
        if float(target[1]) < 1:
            assert float((image[0] == 1).float().mean()) == pytest.approx(float(target[1]), abs=1e-6)
    assert min(shares) < 0.5 < max(shares)
    assert samples[1][0].min() == 1, "the dataset's own image stays as it is"


def test_a_part_is_mixed() -> None:
    samples = images()
    mixing = Mixing(mixup=1.0, cutmix=1.0, probability=0.5)
    unmixed = [bool(mixing(samples.__getitem__, 0, 8, 4)[1].max() == 1) for _ in range(200)]
    assert 90 < sum(unmixed) < 160
    assert not Mixing(probability=1.0).mixes
    assert not Mixing(mixup=1.0, probability=0.0).mixes


@pytest.mark.parametrize("arguments", [{"mixup": -1.0}, {"cutmix": -0.1}, {"probability": 1.1}])
def test_impossible_mixing(arguments: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(arguments))):
        Mixing(**arguments)


def test_any_dataset_can_be_mixed() -> None:
    data = TensorDataset(torch.rand(8, 3, 4, 4), torch.arange(8) % 3)
    data.num_classes, data.input_shape = 3, (3, 4, 4)
    mixed = Mixed(data, mixup=0.4)
    assert (len(mixed), mixed.num_classes, mixed.input_shape) == (8, 3, (3, 4, 4))
    assert mixed[2][1].shape == (3,)
    assert not hasattr(mixed, "__getitems__")
    assert pickle.loads(pickle.dumps(mixed)).input_shape == (3, 4, 4)


def test_what_cannot_be_mixed() -> None:
    with pytest.raises(UserError, match="needs mixup or cutmix above 0"):
        Mixed(images())
    with pytest.raises(UserError, match="list has no attribute num_classes"):
        Mixed(images(), mixup=1.0)
    with pytest.raises(UserError, match="class 3, and there are 3 classes"):
        Mixed(images(), mixup=1.0, num_classes=3)[3]
    with pytest.raises(UserError, match="sample 0 can't be mixed"):
        Mixed([torch.zeros(3)], mixup=1.0, num_classes=3)[0]
    ragged = Mixed([(torch.zeros(1, 4, 4), 0), (torch.zeros(1, 5, 4), 0)], mixup=1.0, num_classes=3)
    with pytest.raises(UserError, match="images have the shapes"):
        [ragged[0] for _ in range(20)]


# The cut


def epoch_of(data: Any, **cut: Any) -> list[tuple[Tensor, Tensor]]:
    """The samples of two epochs, in order, loaded by two ranks."""
    found: dict[tuple[int, int], list[Any]] = {}
    for rank in range(cut.get("world_size", 1)):
        loader = WindowLoader(data, global_batch_size=6, seed=5, rank=rank, **{"world_size": 1, **cut})
        for epoch in range(2):
            for number, window in enumerate(loader):
                for inputs, targets in window:
                    found.setdefault((epoch, number), []).extend(zip(inputs, targets, strict=True))
    return [sample for key in sorted(found) for sample in sorted(found[key], key=lambda pair: pair[0].sum().item())]


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    return ImageFolder(
        "train",
        write_images(tmp_path / "images"),
        evaluation_fraction=0,
        image_size=8,
        augment=Augment([0.3, 1.0], flip=0.5, colour=0.3, randaugment=5),
        mixing=Mixing(mixup=0.4, cutmix=1.0),
    )


def test_samples_do_not_depend_on_the_cut(folder: ImageFolder) -> None:
    """Crops, flips, colours, RandAugment, partners and shares are those of the sample and the epoch."""
    wanted = epoch_of(folder, micro_batch_size=6)
    assert len(wanted) == 36
    for cut in (
        {"micro_batch_size": 1},
        {"micro_batch_size": 2, "world_size": 2},
        {"micro_batch_size": 4, "options": LoaderOptions(num_workers=2)},
    ):
        found = epoch_of(folder, **cut)
        assert all(torch.equal(*pair) for pairs in zip(found, wanted, strict=True) for pair in zip(*pairs, strict=True))
    assert not torch.equal(wanted[0][0], wanted[18][0]), "another epoch, other random numbers"


def test_mixed_in_the_collate_function_they_do(folder: ImageFolder) -> None:
    """The negative control: mixup within the micro-batch, as it is usually done."""

    def mixed(samples: list[Any]) -> tuple[Tensor, Tensor]:
        inputs, targets = (torch.stack(part) for part in zip(*samples, strict=True))
        share, order = random.betavariate(0.4, 0.4), torch.randperm(len(inputs))
        return share * inputs + (1 - share) * inputs[order], share * targets + (1 - share) * targets[order]

    wanted, found = (epoch_of(folder, micro_batch_size=size, collate_fn=mixed) for size in (6, 3))
    assert not torch.allclose(torch.stack([x for x, _ in wanted]), torch.stack([x for x, _ in found]))
