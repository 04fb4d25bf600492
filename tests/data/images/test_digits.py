import gzip
import subprocess
import sys
from pathlib import Path

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


def test_the_samples_are_those_of_scikit_learn() -> None:
    source = load_digits()
    pixels, labels = torch.as_tensor(source.images).float().unsqueeze(1) / 16, torch.as_tensor(source.target)
    for split in ("train", "evaluation"):
        digits = Digits(split)
        places = [place for label in range(10) for place in (labels == label).nonzero().flatten()[::5].tolist()]
        is_held_out = torch.zeros(len(labels), dtype=torch.bool)
        is_held_out[places] = True
        chosen = is_held_out if split == "evaluation" else ~is_held_out
        assert torch.equal(digits.images, pixels[chosen])
        assert torch.equal(digits.labels, labels[chosen])


def test_the_split_is_fixed() -> None:
    torch.manual_seed(1)
    first = Digits("evaluation").images
    torch.manual_seed(2)
    assert torch.equal(first, Digits("evaluation").images)


def test_another_split() -> None:
    with pytest.raises(UserError, match=r"Digits: split='test' is not known. Give 'train' or 'evaluation'"):
        Digits("test")


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match=r"needs scikit-learn.*pip install 'distaccum\[examples\]'"):
        Digits("train")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        (b"1,2", "Not a gzipped file"),
        (gzip.compress(b"1,2\n3\n", mtime=0), "expected sequence of length 2"),
        (gzip.compress(b"1,2\n3,4\n", mtime=0), r"its table is \[2, 2\], not \[1797, 65\]"),
    ],
)
def test_a_scikit_learn_without_the_digits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None, said: str
) -> None:
    folder = tmp_path / "sklearn" / "datasets" / "data"
    folder.mkdir(parents=True)
    if content is not None:
        (folder / "digits.csv.gz").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "sklearn" / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "sklearn")
    with pytest.raises(UserError, match=f"{said}.*Install scikit-learn again"):
        Digits("train")


def test_scikit_learn_is_not_imported() -> None:
    code = "import sys; from distaccum.data import Digits; Digits('train'); assert 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
