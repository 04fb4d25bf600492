"""Nests of tensors; tests/distributed gathers their rows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from distaccum.runtime.nested import leaves, mapped, tensors_of


class Pair(NamedTuple):
    inputs: object
    targets: object


class Name(str):
    """A text, by inheritance."""


ONE, TWO = torch.ones(1), torch.ones(2)
NEST = {
    "plain": ["a", b"b", 1, 2.0, True],
    "with others": (None, Name("c"), ONE, ["d", [TWO, "e"]]),
    "empty": [],
    "pair": Pair(ONE, OrderedDict(text="f", tensor=TWO)),
}


def test_leaves_are_in_order_whatever_lists_hold() -> None:
    found = leaves(NEST)
    wanted = ["a", b"b", 1, 2.0, True, None, "c", ONE, "d", TWO, "e", ONE, "f", TWO]
    assert len(found) == len(wanted)
    assert all(one is other or one == other for one, other in zip(found, wanted, strict=True))
    assert leaves("a") == ["a"]


class Lazy(Mapping[str, object]):
    """A mapping whose values can be gone through once."""

    def __getitem__(self, key: str) -> object:
        return {"one": ONE, "name": "a"}[key]

    def __iter__(self) -> Iterator[str]:
        return iter(("one", "name"))

    def __len__(self) -> int:
        return 2

    def values(self) -> Any:
        yield from (self[key] for key in self)


def test_values_that_a_mapping_makes_on_the_way() -> None:
    assert leaves(Lazy()) == [ONE, "a"]


def test_tensors_alone() -> None:
    assert [len(tensor) for tensor in tensors_of(NEST)] == [1, 2, 1, 2]
    assert tensors_of(["a", "b"]) == []


def test_mapping_keeps_the_types() -> None:
    found = mapped(NEST, lambda leaf: len(leaf) if isinstance(leaf, torch.Tensor) else leaf)
    assert found == {
        "plain": ["a", b"b", 1, 2.0, True],
        "with others": (None, "c", 1, ["d", [2, "e"]]),
        "empty": [],
        "pair": Pair(1, OrderedDict(text="f", tensor=2)),
    }
    assert type(found["pair"]) is Pair
    assert type(found["pair"].targets) is OrderedDict
