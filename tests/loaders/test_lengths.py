from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

from distaccum import UserError
from distaccum.data import DocumentationText
from distaccum.loaders import lengths
from distaccum.loaders.lengths import lengths_of
from distaccum.runtime.cache import Remembered


class Samples(list[Any]):
    """A dataset made of a list."""


def test_the_datasets_own_lengths_are_taken_without_loading_anything() -> None:
    samples = Samples()
    samples.lengths = [3, 1, 2]  # type: ignore[attr-defined]
    assert lengths_of(samples) == [3, 1, 2]


def test_lengths_are_found_by_loading() -> None:
    def sample(length: int) -> dict[str, Any]:
        return {"tokens": torch.zeros(length, 7), "label": torch.tensor(3), "id": 5, "mask": torch.ones(length)}

    assert lengths_of(Samples([sample(length) for length in (4, 1, 9)])).tolist() == [4, 1, 9]


def test_the_text_tells_its_lengths() -> None:
    text = DocumentationText("evaluation", max_length=64)
    known = text.lengths
    del text.lengths
    loaded = Samples([text_sample(known, text, index) for index in range(len(known))])
    assert np.array_equal(lengths_of(loaded), known)


def test_lists_count_as_the_tensors_they_become() -> None:
    """Rows of tables: a list of numbers is a field, and one that is a sample holds fields."""
    rows = [{"ids": [1, 2, 3], "name": "a text", "size": 7}, {"ids": [], "labels": [1, 2]}]
    assert lengths_of(Samples(rows)).tolist() == [3, 2]
    with pytest.raises(UserError, match="sample 0 has no tensor"):
        lengths_of(Samples([[1, 2, 3]]))


def text_sample(lengths: list[int], text: DocumentationText, index: int) -> Any:
    text.lengths = lengths
    return text[index]


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([torch.zeros(2), torch.tensor(1.0)], "sample 1 has no tensor with a first dimension"),
        ([5], "sample 0 has no tensor with a first dimension"),
    ],
)
def test_samples_without_a_length_are_named(samples: list[Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        lengths_of(Samples(samples))


class Loaded(list[Any]):
    """Counts how often its samples are loaded, each of which draws a number."""

    loads = 0

    def __getitem__(self, index: Any) -> Any:
        self.loads += 1
        torch.rand(())
        return super().__getitem__(index)


def test_a_scan_is_remembered_until_the_data_changes() -> None:
    samples = Loaded(torch.zeros(1 + index % 7) for index in range(50))
    wanted = [1 + index % 7 for index in range(50)]
    assert lengths_of(samples, Remembered("lengths")).tolist() == wanted
    assert samples.loads == 100, "once to see that they draw, and once with numbers of their own"
    assert lengths_of(samples, Remembered("lengths")).tolist() == wanted
    assert samples.loads == 100 + 32
    samples[0] = torch.zeros(9)
    assert lengths_of(samples, Remembered("lengths")).tolist() == [9, *wanted[1:]]
    samples.append(torch.zeros(2))
    assert lengths_of(samples, Remembered("lengths")).tolist() == [9, *wanted[1:], 2]


class Drawn(list[int]):
    """Samples of a drawn length."""

    def __getitem__(self, index: Any) -> Any:
        return torch.zeros(int(torch.randint(1, 1000, ())) + super().__getitem__(index))


def test_workers_find_the_same_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = Drawn([0] * 301)
    wanted = lengths_of(samples)
    assert len(set(wanted.tolist())) > 200
    monkeypatch.setattr(lengths, "_SECONDS_ALONE", 0.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2})
    assert np.array_equal(lengths_of(samples), wanted)
    samples[300] = -1000
    with pytest.raises(UserError, match=r"sample 300 of the training data could not be loaded: RuntimeError"):
        lengths_of(samples)


def test_a_damaged_scan_is_made_again() -> None:
    remembered = Remembered("lengths")
    remembered.write([1, 2])
    remembered.path.write_text("[1, 2")
    assert lengths_of(Samples([torch.zeros(3)]), remembered).tolist() == [3]
    assert remembered.read() == [3]


def test_a_scan_leaves_the_generators_alone() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(())
    torch.manual_seed(3)
    lengths_of(Loaded([torch.zeros(3)]))
    assert torch.rand(()) == wanted
