import sys

import pytest
import torch
from sklearn.datasets import load_digits  # here, because it sets environment variables when first imported

from distaccum.data import Digits
from distaccum.errors import UserError


def test_samples() -> None:
    for split in ("train", "evaluation"):
        digits = Digits(split)
        image, label = digits[0]
        assert image.shape == digits.input_shape == (1, 8, 8)
        assert image.dtype == torch.float32
        assert label.dtype == torch.int64
        assert digits.images.min() == 0
        assert digits.images.max() == 1
        assert len(digits) == len(digits.images) == len(digits.labels)


def test_the_splits_are_stratified_and_lose_nothing() -> None:
    train, evaluation = Digits("train"), Digits("evaluation")
    assert len(train) + len(evaluation) == 1797
    share = evaluation.labels.bincount() / (train.labels.bincount() + evaluation.labels.bincount())
    assert share.shape == (Digits.num_classes,)
    assert ((share - 0.2).abs() < 0.005).all()


def test_the_splits_are_disjoint() -> None:
    source = load_digits().data / 16
    both = torch.cat([Digits("train").images, Digits("evaluation").images]).flatten(1)
    assert torch.equal(both.double().sort(dim=0).values, torch.as_tensor(source).sort(dim=0).values)


def test_the_split_is_fixed() -> None:
    torch.manual_seed(1)
    first = Digits("evaluation").images
    torch.manual_seed(2)
    assert torch.equal(first, Digits("evaluation").images)


def test_another_split() -> None:
    with pytest.raises(UserError, match=r"Digits: split='test' is not known. Give 'train' or 'evaluation'"):
        Digits("test")


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"needs scikit-learn.*pip install 'distaccum\[examples\]'"):
        Digits("train")
