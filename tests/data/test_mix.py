from __future__ import annotations

import logging
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from distaccum import WindowLoader
from distaccum.data import Rows
from distaccum.data.mix import Mix, apportioned
from distaccum.errors import UserError
from distaccum.loaders.lengths import lengths_of


class Named(Dataset[Any]):
    def __init__(self, name: str, size: int, **more: Any) -> None:
        self.name, self.vocab_size, self.size = name, 7, size
        vars(self).update(more)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.name, index


class KnownLengths(Dataset[Any]):
    def __init__(self, samples: list[Any], lengths: list[int]) -> None:
        self.samples, self.lengths = samples, lengths

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


def mix_of(sizes: dict[str, int], weights: dict[str, float], **more: Any) -> Mix:
    return Mix({name: Named(name, size) for name, size in sizes.items()}, weights, **more)


@given(st.integers(0, 10**6), st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6))
def test_shares_are_met_as_far_as_whole_numbers_allow(total: int, weights: list[float]) -> None:
    named = {str(number): weight for number, weight in enumerate(weights)}
    counts = apportioned(total, named)
    assert list(counts) == list(named)
    assert sum(counts.values()) == total
    for name, weight in named.items():
        assert abs(counts[name] - total * weight / sum(weights)) < 1 + 1e-9 * total


def test_weights_are_the_decimal_numbers_they_are_written_as() -> None:
    assert apportioned(10, {"a": 0.7, "b": 0.3}) == {"a": 7, "b": 3}
    assert apportioned(7, {"a": 1, "b": 1, "c": 1}) == {"a": 3, "b": 2, "c": 2}
    assert apportioned(1000, {"a": 0.1, "b": 0.2, "c": 0.7}) == {"a": 100, "b": 200, "c": 700}


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(1, 30), min_size=2, max_size=4),
    st.integers(20, 60),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
def test_each_source_is_gone_through_whole_before_a_sample_comes_again(
    sizes: list[int], total: int, seed: int, random: Any
) -> None:
    named = {str(number): size for number, size in enumerate(sizes)}
    mix = mix_of(named, {name: random.uniform(0.2, 1) for name in named}, num_samples=total, seed=seed)
    drawn: dict[str, list[int]] = {name: [] for name in named}
    for epoch in range(4):
        found = mix.drawn(epoch, range(total))
        assert Counter(name for name, _ in found) == mix.counts
        assert mix.samples_of_epoch(epoch, range(total)) == found
        backwards = mix.drawn(epoch, range(total - 1, -1, -1))
        assert backwards[::-1] == found
        for name, sample in found:
            drawn[name].append(sample)
    for name, size in named.items():
        rounds = [drawn[name][start : start + size] for start in range(0, len(drawn[name]), size)]
        for entry in rounds:
            assert len(set(entry)) == len(entry)
        if size > 5 and len(rounds) > 2:
            assert rounds[0] != rounds[1], "each time round has another order"


class Labels:
    num_classes, input_shape = 3, (2,)

    def __init__(self, offset: int) -> None:
        self.offset = offset

    def __call__(self, row: dict[str, Any]) -> Any:
        return row["x"] + self.offset


def test_attributes_of_the_sources_transforms_are_the_mixs(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n{"x": 2}\n')
    file = str(tmp_path / "a.jsonl")
    sources = {
        name: Rows(file, evaluation_fraction=0, transform=Labels(offset)) for name, offset in (("a", 0), ("b", 5))
    }
    mix = pickle.loads(pickle.dumps(Mix(sources, {"a": 1, "b": 1})))
    assert (mix.num_classes, mix.input_shape) == (3, (2,))
    assert not hasattr(mix, "offset")
    assert sorted(mix.samples_of_epoch(0, range(4))) == [1, 2, 6, 7]


def test_it_says_what_an_epoch_has(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "distaccum.data")
    mix = mix_of({"a": 400, "b": 100}, {"a": 0.7, "b": 0.3})
    assert len(mix) == 500
    assert mix.vocab_size == 7
    assert not hasattr(mix, "name")
    assert caplog.messages == [
        "mix of 500 samples an epoch: a 350 of its 400 (0.875 times round), b 150 of its 100 (1.5 times round)"
    ]
    assert mix.order == "a 350 of 400, b 150 of 100"
    assert mix[0] == mix.samples_of_epoch(0, [0])[0]
    assert mix_of({"a": 400, "b": 100}, {"a": 0.7, "b": 0.3}, seed=1)[0] != mix[0]
    with pytest.raises(IndexError):
        mix[500]


def test_a_mix_of_mixes() -> None:
    inner = mix_of({"a": 6, "b": 6}, {"a": 1, "b": 1}, num_samples=4)
    outer = Mix({"inner": inner, "c": Named("c", 4)}, {"inner": 1, "c": 1})
    found = [entry for epoch in range(3) for entry in outer.samples_of_epoch(epoch, range(8))]
    assert Counter(name for name, _ in found) == {"a": 6, "b": 6, "c": 12}
    assert {index for name, index in found if name == "a"} == set(range(6)), "times round are the inner mix's epochs"


def test_what_does_not_fit_is_refused() -> None:
    def refused(message: str, sizes: dict[str, int], weights: dict[str, float], **more: Any) -> None:
        with pytest.raises(UserError, match=message):
            mix_of(sizes, weights, **more)

    refused(r"the sources are a, b, and the weights are for a\.", {"a": 1, "b": 1}, {"a": 1})
    refused(r"the sources are none", {}, {})
    refused(r"data.mix.a=0 must be positive", {"a": 1, "b": 1}, {"a": 0, "b": 1})
    refused(r"of 3 samples an epoch none are from b", {"a": 9, "b": 9}, {"a": 1, "b": 0.01}, num_samples=3)
    refused(r"data.sources.a data .* is empty", {"a": 0}, {"a": 1})
    for more in ({"is_ordered": True}, {"collate_fn": list}):
        with pytest.raises(UserError, match=r"b is a Named, which can only be read forwards|in different ways.*type"):
            Mix({"a": Named("a", 3), "b": Named("b", 3, **more)}, {"a": 1, "b": 1})
    mix = mix_of({"a": 3, "b": 3}, {"a": 1, "b": 1})
    with pytest.raises(UserError, match=r"lengths.*Mix change from epoch to epoch.*batch=uniform"):
        WindowLoader(mix, global_batch_size=2, lengths=[1] * 6)
    with pytest.raises(UserError, match=r"data.sources.a: .*a Named doesn't know its own.*find_lengths"):
        lengths_of(mix)


@pytest.mark.parametrize("packed", [False, True])
def test_samples_have_their_lengths_in_every_epoch(packed: bool) -> None:
    def source(first: int, count: int) -> Any:
        sizes = [1 + (first + index) % 7 for index in range(count)]
        samples = [{"input_ids": torch.full((size,), first + index)} for index, size in enumerate(sizes)]
        return KnownLengths(samples, sizes)

    inner = Mix({"a": source(0, 6), "b": source(10, 9)}, {"a": 1, "b": 2}, num_samples=7)
    mix = Mix({"inner": inner, "c": source(20, 30)}, {"inner": 3, "c": 1}, num_samples=19, seed=5)
    lengths = lengths_of(mix)
    for epoch in range(4):
        wanted = [len(sample["input_ids"]) for sample in mix.samples_of_epoch(epoch, range(19))]
        assert lengths[np.arange(19) + 19 * epoch].tolist() == wanted
    assert lengths.longest == 7
    assert lengths[lengths.longest_samples(3)].tolist() == sorted(lengths[:].tolist())[:-4:-1]
    batch = {"global_batch_size": 8, "seed": 3}
    plain = WindowLoader(mix, **batch)
    loaders = [
        WindowLoader(mix, **batch, lengths=lengths, packed=packed, max_tokens=12, rank=rank, world_size=2)
        for rank in range(2)
    ]
    for _ in range(3):
        for windows in zip(plain, *loaders, strict=True):
            batches = [[batch["input_ids"] for batch in window] for window in windows]
            ids = [{number for batch in window for number in batch.flatten().tolist()} - {0} for window in batches]
            assert ids[0] == ids[1] | ids[2]
            assert max(batch.numel() for window in batches[1:] for batch in window) <= 12


def test_a_sample_that_can_not_be_loaded_is_named_with_its_source() -> None:
    class Broken(Named):
        def __getitem__(self, index: int) -> Any:
            raise ValueError("no such thing")

    mix = Mix({"good": Named("good", 2), "bad": Broken("bad", 2)}, {"good": 1, "bad": 1})
    with pytest.raises(UserError, match=r"of samples \[.*bad, samples .*ValueError: no such thing"):
        list(next(iter(WindowLoader(mix, global_batch_size=4, collate_fn=list))))


def test_what_a_source_draws_belongs_to_the_place_in_the_epoch() -> None:
    class Noisy(Named):
        def __getitem__(self, index: int) -> Any:
            return torch.rand(())

    mix = Mix({"a": Noisy("a", 2), "b": Noisy("b", 5)}, {"a": 1, "b": 1}, num_samples=12)
    found = []
    for size in (1, 4):
        loader = WindowLoader(mix, global_batch_size=4, micro_batch_size=size, seed=3)
        found.append([torch.cat(list(window)) for _ in range(2) for window in loader])
    assert torch.equal(torch.cat(found[0]), torch.cat(found[1]))
    assert len(torch.cat(found[0]).unique()) == 24, "a repeated sample is another one each time"


def test_by_configuration(tmp_path: Path) -> None:
    from distaccum.config.compose import compose
    from distaccum.config.instantiate import build

    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"{name}": {number}}}\n' for number in range(10)))
    sources = [f"+data.sources.{name}._target_=distaccum.data.Rows" for name in ("a", "b")]
    sources += [f"+data.sources.{name}.files={tmp_path}/{name}.jsonl" for name in ("a", "b")]
    sources += [f"+data.sources.{name}.evaluation_fraction=0.0" for name in ("a", "b")]
    config = compose(["data=mix", *sources, "data.mix={a: 0.7, b: 0.3}", "data.mix_samples=10", "seed=4"])
    mix = build(config.data.train, "data.train")
    assert Counter("a" if "a" in row else "b" for row in mix.samples_of_epoch(1, range(10))) == {"a": 7, "b": 3}
    assert mix._seeds == mix_of({"a": 1, "b": 1}, {"a": 1, "b": 1}, seed=4)._seeds
