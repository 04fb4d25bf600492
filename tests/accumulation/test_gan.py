"""The GAN of docs/examples/gan.md: exact for any cut and rank, and it learns digits."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from documents import block_run_by
from examples import distance
from launching import torchrun
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor

BLOCK = block_run_by("accumulation/test_gan.py")
IN_FLOAT64 = "import torch\ntorch.set_default_dtype(torch.float64)\n"
SAVE = """
if int(os.environ.get("RANK", 0)) == 0:
    torch.save([p.detach() for m in (generator, discriminator) for p in m.parameters()], r"{path}")
"""
SAMPLE = """
if int(os.environ.get("RANK", 0)) == 0:
    torch.manual_seed(1)
    torch.save(generator(torch.randn(2000, 16)).detach(), r"{path}")
"""


def _script(folder: Path, text: str, save: str) -> tuple[Path, Path]:
    script, saved = folder / "gan.py", folder / "saved.pt"
    script.write_text(text + save.format(path=saved))
    return script, saved


def _changed(text: str, *changes: tuple[str, str]) -> str:
    for before, after in changes:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    return text


def _parameters(folder: Path, *changes: tuple[str, str]) -> Tensor:
    """After one epoch in one process, in float64."""
    text = _changed(BLOCK, ("range(20)", "range(1)"), *changes)
    script, saved = _script(folder, IN_FLOAT64 + text, SAVE)
    before = torch.get_default_dtype()
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        torch.set_default_dtype(before)
    return torch.cat([value.reshape(-1) for value in torch.load(saved)])


def test_two_ranks_are_the_large_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """29 updates of both models, the last ones of 5 samples; and the traps, which the same comparison notices."""
    monkeypatch.delenv("RANK", raising=False)
    one_shot = ('"micro_batch_size": 16', '"micro_batch_size": 64')
    wanted = _parameters(tmp_path, one_shot)
    script, saved = _script(tmp_path, IN_FLOAT64 + _changed(BLOCK, ("range(20)", "range(1)")), SAVE)
    done = torchrun(2, str(script))
    assert done.returncode == 0, done.stderr
    found = torch.cat([value.reshape(-1) for value in torch.load(saved)])
    assert distance(found, wanted) < 1e-12
    for trap in (
        ("requires_grad_(False)", "requires_grad_(True)"),
        ("fake = generator(latents)", "fake = generator(torch.randn_like(latents))"),
        ("weight=len(logits))\n        judge", "weight=16)\n        judge"),
    ):
        assert distance(_parameters(tmp_path, trap), wanted) > 1e-2, trap


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Between normal distributions with the means and covariances of two sets of vectors (as in FID, of pixels)."""
    first, second = one.double(), other.double()
    covariances = [vectors.T.cov() for vectors in (first, second)]
    root = _square_root(covariances[0])
    overlap = _square_root(root @ covariances[1] @ root).trace()
    traces = covariances[0].trace() + covariances[1].trace()
    return float((first.mean(0) - second.mean(0)).square().sum() + traces - 2 * overlap)


def _square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def test_it_learns_digits_on_two_ranks(tmp_path: Path) -> None:
    """All ten digits come out. Half of the digits is 0.3 from the other half; an untrained generator is over 30."""
    script, saved = _script(tmp_path, BLOCK, SAMPLE)
    done = torchrun(2, str(script))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch ") == 2
    source = load_digits()
    digits = torch.from_numpy(source.data).float() / 8 - 1
    samples = torch.load(saved)
    assert frechet_distance(samples, digits) < 12
    classifier = LogisticRegression(max_iter=2000).fit(digits.numpy(), source.target)
    likely = classifier.predict_proba(samples.numpy())
    assert np.median(likely.max(axis=1)) > 0.6
    assert np.bincount(likely.argmax(axis=1), minlength=10).min() > 20
