from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from distaccum.config import as_plain
from distaccum.config.compose import compose
from distaccum.config.enums import PrecisionName
from distaccum.errors import UserError
from distaccum.training.run import check_same_config

CONFIG = {"seed": 3, "model": {"_target_": "mine.Net", "sizes": [1, 2]}, "run_dir": None}


# Plain configurations


class Colour(Enum):
    red = 1


@dataclass
class Inner:
    colour: Colour = Colour.red
    numbers: list[int] = field(default_factory=lambda: [1, 2])


def test_as_plain() -> None:
    found = as_plain({"a": Inner(), "b": [Inner(), 2.5, None, True], "c": {"d": "text"}})
    inner = {"colour": "red", "numbers": [1, 2]}
    assert found == {"a": inner, "b": [inner, 2.5, None, True], "c": {"d": "text"}}


def test_as_plain_takes_a_whole_configuration() -> None:
    found = as_plain(compose(["precision=bf16", "+observers.mine._target_=a.B"]))
    assert found["precision"] == {"name": PrecisionName.bf16.name}
    assert found["observers"] == {"mine": {"_target_": "a.B"}}
    assert found["data"]["train"] == {"_target_": "distaccum.data.Digits", "split": "train"}
    OmegaConf.to_yaml(OmegaConf.create(found))


# Ranks with different configurations; tests/distributed has real ones


def _ranks(*flat: dict[str, Any]) -> Any:
    return SimpleNamespace(gather=lambda own: [own, *flat])


def test_equal_configurations_pass() -> None:
    check_same_config(_ranks({"seed": 3, "model._target_": "mine.Net", "model.sizes": [1, 2], "run_dir": None}), CONFIG)


def test_nan_is_the_same_on_all_ranks() -> None:
    check_same_config(_ranks({"optim.lr": float("nan")}), {"optim": {"lr": float("nan")}})


def test_different_values_are_named_with_their_ranks() -> None:
    other = {"seed": 4, "model._target_": "mine.Net", "model.sizes": [1, 2], "run_dir": None}
    same = {**other, "seed": 3}
    with pytest.raises(UserError) as refused:
        check_same_config(_ranks(same, other), CONFIG)
    assert str(refused.value) == (
        "the ranks were started with different configurations: seed is 3 on rank 0, 3 on rank 1, 4 on rank 2. Give all "
        "the same."
    )


def test_a_key_that_one_rank_lacks_is_named() -> None:
    with pytest.raises(UserError, match=r"model\.width is None on rank 0, 7 on rank 1\."):
        check_same_config(_ranks({"model.width": 7}), {})


def test_many_differences_are_counted() -> None:
    with pytest.raises(UserError, match=r": k0 is 0 on rank 0, 1 on rank 1; .*; and 3 more keys\. Give all the same\."):
        check_same_config(_ranks({f"k{i}": 1 for i in range(8)}), {f"k{i}": 0 for i in range(8)})
