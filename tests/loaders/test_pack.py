from __future__ import annotations

from typing import Any

import pytest
import torch

from distaccum import WindowLoader
from distaccum.errors import UserError
from distaccum.loaders import PackCollate


def test_tuples_are_put_end_to_end_with_their_lengths() -> None:
    samples = [(torch.arange(n), torch.arange(n) + 1) for n in (3, 1, 2)]
    inputs, targets = PackCollate()(samples)
    assert inputs["tokens"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert inputs["sample_lengths"].tolist() == [3, 1, 2]
    assert targets.tolist() == [[1, 2, 3, 1, 1, 2]]


def test_mappings_are_put_end_to_end_with_positions_that_begin_anew() -> None:
    samples = [{"input_ids": list(range(n)), "labels": torch.arange(n)} for n in (3, 2)]
    packed = PackCollate()(samples)
    assert {name: tensor.tolist() for name, tensor in packed.items()} == {
        "input_ids": [[0, 1, 2, 0, 1]],
        "labels": [[0, 1, 2, 0, 1]],
        "position_ids": [[0, 1, 2, 0, 1]],
    }


def test_features_of_more_dimensions_and_other_names() -> None:
    samples = [(torch.full((n, 4), float(n)), torch.zeros(n, dtype=torch.int64)) for n in (2, 1)]
    inputs, _ = PackCollate(tokens="x", position_ids="where", sample_lengths="sizes")(samples)
    assert inputs["x"].shape == (1, 3, 4)
    assert inputs["where"].tolist() == [[0, 1, 0]]
    assert inputs["sizes"].tolist() == [2, 1]


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([torch.arange(3)], r"as it is a Tensor: it must be a tuple \(tokens, targets\) or a mapping"),
        ([(torch.arange(3), torch.arange(2))], r"its fields are \[3\], \[2\], and they must all be sequences"),
        ([(torch.arange(3), 1)], r"its fields are \[3\], \[\]"),
        ([{"x": torch.arange(3), "name": "a"}], r"its fields are \[3\], str"),
        ([{"x": torch.arange(3)}, {"y": torch.arange(3)}], "don't have the same fields"),
    ],
)
def test_what_cannot_be_packed(samples: list[Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        PackCollate()(samples)


class Sequences(torch.utils.data.Dataset[Any]):
    lengths = tuple(1 + (7 * index) % 11 for index in range(40))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Any:
        return torch.full((self.lengths[index],), index), torch.arange(self.lengths[index])

    @staticmethod
    def collate_fn(samples: list[Any]) -> Any:
        raise AssertionError("it pads, and is for evaluations")


def test_windows_have_the_same_samples_packed() -> None:
    options: dict[str, Any] = {"global_batch_size": 16, "lengths": Sequences.lengths}
    found = WindowLoader(Sequences(), packed=True, max_tokens=24, **options)
    wanted = WindowLoader(Sequences(), collate_fn=list, **options)
    for window, other in zip(found, wanted, strict=True):
        batches = list(window)
        assert all(inputs["tokens"].shape[1] <= 24 for inputs, _ in batches)
        tokens = torch.cat([inputs["tokens"][0] for inputs, _ in batches])
        assert sorted(tokens.tolist()) == sorted(int(t) for batch in other for sample in batch for t in sample[0])
        assert [len(inputs["sample_lengths"]) for inputs, _ in batches] == list(window.sizes)
        assert window.is_by_length


def test_packing_needs_lengths() -> None:
    with pytest.raises(UserError, match="packed=True needs the samples' lengths"):
        WindowLoader(Sequences(), global_batch_size=16, packed=True)
