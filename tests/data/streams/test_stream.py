"""Samples that can only be read forwards: their order, the places that reading goes on from, and what goes wrong."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import IterableDataset, get_worker_info

from distaccum import WindowLoader
from distaccum.data import Lines, Shards, Stream
from distaccum.data.streams.stream import stream_data
from distaccum.data.streams.stream_reader import checksum
from distaccum.errors import UserError
from distaccum.loaders import EvaluationLoader, LoaderOptions

ALONE = {"rank": 0, "world_size": 1}


class Counted:
    """Shards of given sizes, whose samples are numbered through; counts what is read of each."""

    def __init__(self, sizes: list[int]) -> None:
        firsts = itertools.accumulate(sizes, initial=0)
        self.shards = [range(first, first + size) for first, size in zip(firsts, sizes, strict=False)]
        self.read = 0

    def open(self, shard: range, start: int) -> Iterator[int]:
        for sample in shard[start:]:
            self.read += 1
            yield sample


def epoch_of(stream: Stream, epoch: int, first: int = 0) -> list[Any]:
    return stream.samples_of_epoch(epoch, range(first, len(stream)))


SIZES = st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(any)


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, lanes=st.integers(1, 5), block=st.integers(16, 50), seed=st.integers(0, 9), data=st.data())
def test_each_sample_comes_once_and_any_place_is_reached_with_one_block_more(
    sizes: list[int], lanes: int, block: int, seed: int, data: st.DataObject
) -> None:
    count = sum(sizes)

    def stream() -> Stream:
        return Stream(Counted(sizes), num_samples=count, lanes=lanes, buffer=block, seed=seed)

    whole = stream()
    epoch = data.draw(st.integers(0, 2))
    order = epoch_of(whole, epoch)
    assert sorted(order) == list(range(count))
    assert order != epoch_of(whole, epoch + 1) or count < 9
    place = data.draw(st.integers(0, count - 1))
    cursors = json.loads(json.dumps(whole.cursors_at(epoch, [place])))
    other = stream()
    other.learn(cursors)
    assert epoch_of(other, epoch, place) == order[place:]
    before_place = other.source.read - (count - place)  # type: ignore[attr-defined]
    assert 0 <= before_place < block
    # Some of the positions, as a rank is asked for them.
    mine = sorted(data.draw(st.sets(st.integers(0, count - 1), max_size=20)))
    assert stream().samples_of_epoch(epoch, mine) == [order[position] for position in mine]


@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, lanes=st.integers(1, 5), block=st.integers(16, 40), first=st.integers(0, 200))
def test_an_endless_stream_goes_through_its_shards_again_and_again(
    sizes: list[int], lanes: int, block: int, first: int
) -> None:
    count = sum(sizes)
    stream = Stream(Counted(sizes), endless=True, lanes=lanes, buffer=block)
    length = -(-(3 * count) // block) * block  # whole blocks
    found = stream.samples_of_epoch(0, range(length))
    often = [found.count(number) for number in range(count)]
    assert min(often) >= 2
    assert max(often) - min(often) <= 2
    other = Stream(Counted(sizes), endless=True, lanes=lanes, buffer=block)
    other.learn(stream.cursors_at(0, [first % length]))
    assert other.samples_of_epoch(0, range(first % length, length)) == found[first % length :]


def test_the_order_is_always_this_one() -> None:
    """Of any version: a run goes on with another one."""
    stream = Stream(Counted([9, 0, 3, 14]), num_samples=26, lanes=2, buffer=16, seed=3)
    assert epoch_of(stream, 0) == ORDER
    assert Stream(Counted([3, 2]), num_samples=5, shuffle=False).samples_of_epoch(1, range(5)) == list(range(5))


ORDER = [5, 7, 18, 12, 2, 16, 1, 17, 15, 13, 4, 0, 14, 6, 3, 19, 20, 22, 21, 10, 24, 25, 9, 11, 23, 8]


def test_memory_and_reading_stay_small() -> None:
    source = Counted([100_000])
    stream = Stream(source, endless=True, buffer=100)
    stream.samples_of_epoch(0, [50_000])
    assert source.read < 50_000 + 300
    assert sum(map(len, stream._reader.blocks.values())) <= 201  # type: ignore[union-attr]
    stream.samples_of_epoch(0, range(50_000, 50_500))
    before = source.read
    stream.samples_of_epoch(0, [50_010])  # once more, as after running out of memory
    assert source.read - before < 300


def test_lines_of_files(tmp_path: Path) -> None:
    rows = [{"id": number, "text": "ä" * (number % 5)} for number in range(50)]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "".join(f"{json.dumps(row)}\n\n" for row in rows[:20]), "utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows[20:])).encode()))
    (tmp_path / "c.jsonl").write_text("")
    files = str(tmp_path / "*.jsonl*")
    stream = stream_data(files=files, buffer=16, lanes=2)
    assert len(stream) == 50
    order = epoch_of(stream, 1)
    assert sorted(row["id"] for row in order) == list(range(50))
    other = pickle.loads(pickle.dumps(stream_data(files=files, buffer=16, lanes=2)))
    other.learn(json.loads(json.dumps(stream.cursors_at(1, [40]))))
    assert epoch_of(other, 1, 40) == order[40:]
    text = tmp_path / "d.txt"
    text.write_text("one\r\n\n two\nthree")
    lines = Stream(Lines(str(text)), shuffle=False)
    assert epoch_of(lines, 0) == [{"text": "one"}, {"text": " two"}, {"text": "three"}]
    text.write_text("one\n{")
    text.rename(tmp_path / "bad.jsonl")
    with pytest.raises(UserError, match=r"bad\.jsonl, the line at byte 4 is no JSON: Expecting .*, at its character 2"):
        Stream(Lines(str(tmp_path / "bad.jsonl")), shuffle=False, transform=str)[1]


def test_a_bad_line_and_a_failing_transform_name_file_and_place(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\nzwei " + "fünf\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.txt, the line at byte 4 is no UTF-8: invalid .* byte, at its byte 6\."):
        Stream(Lines(str(tmp_path / "a.txt")), shuffle=False)[1]

    def broken(sample: Any) -> Any:
        return {}["nix"]

    with pytest.raises(UserError, match=r"a\.txt, the line at byte 0, in data\.transform: KeyError: 'nix'"):
        Stream(Lines(str(tmp_path / "a.txt")), shuffle=False, transform=broken)[0]
    with pytest.raises(UserError, match=r"the stream's sample 3 of epoch 2, in data\.transform: KeyError: 'nix'"):
        Stream([1] * 9, num_samples=9, transform=broken).samples_of_epoch(2, [3])
    for name, instead in {"a.parquet": "data=parquet", "b.tar.gz": "data=webdataset", "c.csv": "Shards"}.items():
        (tmp_path / name).write_text("")
        with pytest.raises(UserError, match=rf"{name} is none of \.jsonl, \.txt, .*Take .*{instead}"):
            Lines(str(tmp_path / name))


def test_a_file_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("1\n2\n")
    with pytest.raises(UserError, match=r"data\.files: .*a\.txt is named twice, also in data\.files"):
        stream_data(files=[str(file), f"{tmp_path}/*.txt"])
    for split in ("train", "evaluation"):
        with pytest.raises(UserError, match=r"data\.evaluation_files: .*a\.txt is named twice, also in data\.files"):
            stream_data(split, files=f"{tmp_path}/*.txt", evaluation_files=[str(file)])


class _Told(Iterator[int]):
    def __next__(self) -> int:
        return 1

    def tell(self) -> Any:
        return np.int64(3)


def test_a_place_that_a_checkpoint_can_not_hold_is_refused() -> None:
    stream = Stream(Shards(["a.bin"], lambda shard, start: _Told()), num_samples=40, buffer=16)
    with pytest.raises(UserError, match=r"shard a\.bin of the stream: tell\(\) .* returns np\.int64\(3\), which a"):
        stream[20]


def test_attributes_of_the_transform_are_the_streams() -> None:
    class Inputs:
        num_classes = 3

        def __call__(self, sample: Any) -> Any:
            return sample

        @staticmethod
        def collate_fn(samples: list[Any]) -> int:
            return len(samples)

    stream = pickle.loads(pickle.dumps(Stream([1], num_samples=1, transform=abs)))
    assert not hasattr(stream, "num_classes")
    stream = Stream([1], num_samples=1, transform=Inputs())
    assert (stream.num_classes, stream.collate_fn([5, 6])) == (3, 2)


def test_counts_are_remembered_for_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO, "distaccum")
    file = tmp_path / "a.txt"
    file.write_text("1\n2\n3\n")
    for times in (1, 1):
        assert len(Stream(Lines(str(file)))) == 3
        assert caplog.text.count("the stream has 3 samples, counted in") == times
    file.write_text("1\n2\n3\n4\n")
    assert len(Stream(Lines(str(file)))) == 4
    for _ in range(2):
        assert len(Stream(list(range(7)))) == 7
    assert caplog.text.count("the stream has 7 samples") == 2


class Split(IterableDataset[int]):
    """Divides itself up by worker, as torch's documentation shows it."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        return iter(range(40) if info is None else range(info.id, 40, info.num_workers))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_of_windows_with_workers_and_after_a_stop(num_workers: int) -> None:
    def loader(source: Any) -> WindowLoader:
        options = LoaderOptions(num_workers=num_workers, persistent_workers=num_workers > 0)
        stream = Stream(source, num_samples=40, buffer=16)
        return WindowLoader(stream, global_batch_size=7, micro_batch_size=2, options=options, **ALONE)

    first = loader(Split())
    windows = [torch.cat(list(window)).tolist() for window in itertools.chain(first, first)]
    assert [len(window) for window in windows] == 2 * [7, 7, 7, 7, 7, 5]
    assert sorted(itertools.chain(*windows[:6])) == sorted(itertools.chain(*windows[6:])) == list(range(40))
    first.close()
    source = Counted([40])
    part = loader(source)
    found = []
    for window in part.epoch(0):
        found.append(torch.cat(list(window)).tolist())
        if window.index == 3:
            break
    state = json.loads(json.dumps(part.state_dict()))
    assert [cursor["position"] for cursor in state["cursors"]] == [16, 16]
    part.close()
    other_source = Counted([40])
    other = loader(other_source)
    other.load_state_dict(state)
    assert other.state_dict() == part.state_dict()
    found += [torch.cat(list(window)).tolist() for window in other.epoch(0, 4)]
    other.close()
    assert found == windows[:6]
    if num_workers == 0:
        assert other_source.read == 40 - 16


def test_random_numbers_belong_to_the_position() -> None:
    def noisy(sample: int) -> torch.Tensor:
        return sample + torch.rand(1, dtype=torch.float64)

    def loaded(micro_batch_size: int) -> list[float]:
        stream = Stream(Counted([20, 13]), num_samples=33, transform=noisy, buffer=16)
        loader = WindowLoader(stream, global_batch_size=8, micro_batch_size=micro_batch_size, **ALONE)
        return torch.cat([batch for window in loader for batch in window]).flatten().tolist()

    assert loaded(1) == loaded(3) == loaded(8)
    assert len({value % 1 for value in loaded(8)}) == 33


def test_evaluation_holds_samples_out_of_the_first_shard() -> None:
    options: dict[str, Any] = {"source": Counted([12, 9]), "evaluation_samples": 5}
    evaluation = stream_data("evaluation", **options)
    parts = [
        torch.cat(list(EvaluationLoader(evaluation, batch_size=2, rank=rank, world_size=3))).tolist()
        for rank in range(3)
    ]
    assert list(itertools.chain(*parts)) == list(range(5))
    assert evaluation[0] == 0
    train = stream_data("train", **options)
    assert sorted(epoch_of(train, 0)) == list(range(5, 21))
    with pytest.raises(UserError, match="first shard has 12 samples, fewer than the 13 that are held out"):
        stream_data("train", source=Counted([12, 9]), evaluation_samples=13, num_samples=8)[0]
    with pytest.raises(UserError, match="nothing to evaluate on"):
        stream_data("evaluation", source=[1])
    with pytest.raises(UserError, match="exactly one of them"):
        stream_data(source=[1], files="a")


def test_streams_of_hugging_face(tmp_path: Path) -> None:
    import datasets
    from datasets.distributed import split_dataset_by_node

    rows = datasets.Dataset.from_dict({"id": list(range(53))})
    stream = Stream(rows.to_iterable_dataset(num_shards=5).map(lambda row: {"id": row["id"] + 1}), lanes=3, buffer=16)
    order = epoch_of(stream, 0)
    assert sorted(row["id"] for row in order) == list(range(1, 54))
    for place in (0, 15, 16, 40, 52):
        other = Stream(stream.source._dataset, lanes=3, buffer=16, num_samples=53)
        other.learn(json.loads(json.dumps(stream.cursors_at(0, [place]))))
        assert epoch_of(other, 0, place) == order[place:]
    with pytest.raises(UserError, match="whose buffer can't be restored"):
        Stream(rows.to_iterable_dataset(num_shards=5).shuffle(seed=1, buffer_size=9).take(20))
    split = split_dataset_by_node(rows.to_iterable_dataset(num_shards=4), rank=0, world_size=2)
    with pytest.raises(UserError, match="Leave out split_dataset_by_node"):
        Stream(split)


def _breaks(shard: str, start: int) -> Iterator[int]:
    for number in range(start, 40):
        if number == 30:
            raise ValueError("bad block")
        yield number


def test_what_goes_wrong_is_said(caplog: pytest.LogCaptureFixture) -> None:
    broken = Stream(Shards(["a.bin"], _breaks), num_samples=40, buffer=16)
    for _ in range(2):  # what has failed does not go on as if it had ended
        with pytest.raises(UserError, match=r"shard a.bin of .* can't be read on after 30 samples: ValueError: bad"):
            epoch_of(broken, 0)
    with pytest.raises(UserError, match=r"can't be read to count its samples: ValueError: bad block"):
        Stream(Shards(["a.bin"], _breaks))
    with pytest.raises(UserError, match=r"has ended after 21 samples in epoch 2, and num_samples=22"):
        epoch_of(Stream(Counted([10, 11]), num_samples=22), 2)
    assert len(epoch_of(Stream(Counted([10, 11]), num_samples=20), 0)) == 20
    assert "more than num_samples=20 samples" in caplog.text
    with pytest.raises(UserError, match="all of its shards are empty"):
        Stream(Counted([0, 0]), endless=True)[0]
    with pytest.raises(UserError, match=r"training data \(Stream\) is empty"):
        WindowLoader(Stream([]), global_batch_size=1, **ALONE)
    for source in (iter([1]), 5):
        with pytest.raises(UserError, match="is no source of a stream"):
            Stream(source)
    with pytest.raises(UserError, match=r"data.buffer=2 is impossible"):
        Stream([1], buffer=2)
    with pytest.raises(UserError, match="contradict each other"):
        Stream([1], endless=True, num_samples=3)
    with pytest.raises(UserError, match="Take batch=uniform"):
        WindowLoader(Stream([1, 2]), lengths=[1, 2], global_batch_size=1, **ALONE)


def test_a_stream_that_has_changed_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    stream = Stream(Counted([50]), num_samples=50, buffer=16)
    epoch_of(stream, 0)
    other = Stream([number + 1 for number in range(50)], num_samples=50, buffer=16)
    other.learn([{key: value for key, value in c.items() if key != "order"} for c in stream.cursors_at(0, [40])])
    assert "gives other samples" not in caplog.text
    epoch_of(other, 0, 40)
    assert caplog.text.count("gives other samples than before at position 32 of epoch 0") == 1
    # Of another order, places say nothing.
    third = Stream(Counted([50]), num_samples=50, buffer=20)
    third.learn(stream.cursors_at(0, [40]))
    assert third.cursors_at(0, [40]) == []
    samples = [b"a", "a", 1, None, [1, 2], {"a": 1}, {"a": 2}, torch.ones(2), torch.zeros(2), torch.ones(2).numpy() * 3]
    assert len({checksum(sample) for sample in samples}) == len(samples)
