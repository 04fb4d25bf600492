from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distaccum.config.compose import compose
from distaccum.config.instantiate import build
from distaccum.data import HubDataset, PadCollate, Rows
from distaccum.data.rows import row_files
from distaccum.data.rows import rows as rows_module
from distaccum.data.storage import made_once
from distaccum.errors import UserError
from distaccum.loaders.lengths import lengths_of

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def rows(first: int, count: int) -> list[dict[str, Any]]:
    return [
        {"id": number, "text": f"ü{number}\n" * (number % 3), "values": [number / 2] * (1 + number % 4)}
        for number in range(first, first + count)
    ]


def write(folder: Path, kind: str, *, files: int = 3, each: int = 7) -> str:
    """Writes rows numbered through several files; returns a pattern that names them."""
    for number in range(files):
        found, path = rows(number * each, each), folder / f"part{number}.{kind}"
        if kind == "jsonl":
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8")
        elif kind == "parquet":
            parquet.write_table(pyarrow.Table.from_pylist(found), path, row_group_size=3)
        else:
            import datasets

            datasets.Dataset.from_list(found).save_to_disk(str(path))
    return str(folder / f"*.{kind}")


ALL = [("jsonl", {}), ("parquet", {}), ("parquet", {"cache": True}), ("saved", {})]


@pytest.mark.parametrize(("kind", "options"), ALL, ids=["jsonl", "parquet", "parquet cached", "saved"])
def test_any_row_of_any_file_in_any_order(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    data = Rows(write(tmp_path, kind), evaluation_fraction=0, **options)
    wanted = rows(0, 21)
    assert len(data) == 21
    assert [data[index] for index in range(21)] == wanted
    order = np.random.default_rng(0).permutation(21).tolist()
    for found in (data, pickle.loads(pickle.dumps(data))):
        assert found.__getitems__(order) == [wanted[index] for index in order]
    assert data[-1] == wanted[20]
    with pytest.raises(IndexError):
        data[21]


@pytest.mark.parametrize(("kind", "options"), ALL, ids=["jsonl", "parquet", "parquet cached", "saved"])
def test_columns_and_transform(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    class Doubled:
        num_classes = 0

        def __init__(self) -> None:
            self.num_classes = 7

        def collate_fn(self, samples: list[Any]) -> Any:
            return PadCollate((-1,))(samples)

        def __call__(self, row: dict[str, Any]) -> Any:
            return torch.tensor(row["x"]) * 2

    files = write(tmp_path, kind)
    data = Rows(files, evaluation_fraction=0, columns={"x": "values"}, transform=Doubled(), **options)
    assert data.num_classes == 7
    assert data.collate_fn(data.__getitems__([0, 1])).tolist() == [[0.0, -1.0], [1.0, 1.0]]
    assert Rows(files, evaluation_fraction=0, columns=["id"], **options)[4] == {"id": 4}
    with pytest.raises(UserError, match=r"has no column idd\. It has .*id.*text.*values"):
        Rows(files, columns=["idd"], **options)[0]

    def broken(row: dict[str, Any]) -> Any:
        return 1 / row["id"]

    with pytest.raises(UserError, match=r"part0\..*, row 1, in data.transform: ZeroDivisionError"):
        Rows(files, evaluation_fraction=0, transform=broken, **options).__getitems__([3, 0])


def test_evaluation_by_a_fraction_or_by_files(tmp_path: Path) -> None:
    files = write(tmp_path, "jsonl")
    parts = [Rows(files, split, evaluation_fraction=0.25) for split in ("train", "evaluation")]
    ids = [[row["id"] for row in part.__getitems__(range(len(part)))] for part in parts]
    assert ids[1] == [0, 4, 8, 12, 16, 20]
    assert sorted(ids[0] + ids[1]) == list(range(21))
    first, others = str(tmp_path / "part0.jsonl"), str(tmp_path / "part[12].jsonl")
    assert len(Rows(others, "train", evaluation_files=first)) == 14
    assert len(Rows(others, "evaluation", evaluation_files=first)) == 7
    with pytest.raises(UserError, match=r"data\.evaluation_files: .*part0\.jsonl is named twice, also in data\.files"):
        Rows(files, "train", evaluation_files=first)
    with pytest.raises(UserError, match=r"data\.files: .*part0\.jsonl is named twice"):
        Rows([files, first])
    with pytest.raises(UserError, match=r"evaluation_fraction=0 of 21 samples leaves none for the evaluation"):
        Rows(files, "evaluation", evaluation_fraction=0)


@given(st.lists(st.sampled_from(['{"a": 1}', '  {"a": 2} ', "", "   ", "\t", '{"a": "x\\ny"}']), max_size=9))
def test_an_index_finds_each_line_that_is_not_blank(lines: list[str]) -> None:
    import io

    for ending in ("", "\n"):
        for mark in ("", "\ufeff"):
            for newline in ("\n", "\r\n"):
                content = (mark + newline.join(lines) + ending).encode()
                source = io.BytesIO(content)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(row_files, "_BLOCK", 5)
                    starts = [int(start) for part in row_files._line_starts(source) for start in part]
                starts.append(len(content))
                found = [json.loads(content[begin:end]) for begin, end in pairwise(starts)]
                assert found == [json.loads(line) for line in lines if line.strip()]


def test_an_index_is_made_once_and_again_when_the_file_has_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "distaccum.data")
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 0}\n')
    assert [len(Rows(str(path), evaluation_fraction=0)) for _ in range(2)] == [1, 1]
    assert caplog.text.count("made the row-index of") == 1
    assert "1 rows; 0.0 s, kept in" in caplog.text
    path.write_text('{"id": 0}\n{"id": 1}\n')
    assert len(Rows(str(path), evaluation_fraction=0)) == 2
    assert len(list((tmp_path / made_once.FOLDER).glob("a.jsonl*"))) == 1
    assert len(Rows(str(tmp_path / "*"), evaluation_fraction=0)) == 2, "what is made once is no data itself"


def test_of_those_that_want_it_at_once_one_makes_it(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    made: list[int] = []

    def make(file: Any) -> str:
        made.append(1)
        time.sleep(0.1)
        file.write(bytes(16))
        return "two numbers"

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(made_once.made_once, [str(tmp_path / "a")], "zeros", make) for _ in range(4)]
    (path,) = {entry.result() for entry in asked}
    assert made == [1]
    assert made_once.Mapped(path).array.tolist() == [0, 0]


def test_what_is_made_once_lies_in_the_cache_where_the_folder_can_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / made_once.FOLDER).write_text("a file where a folder should be")
    path = tmp_path / "data" / "a.jsonl"
    path.write_text('{"id": 0}\n')
    assert Rows(str(path), evaluation_fraction=0)[0] == {"id": 0}
    assert len(list((tmp_path / "cache").rglob("*.row-index"))) == 1
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"row-index of .*a.jsonl can't be written .*XDG_CACHE_HOME"):
        Rows(str(path))


def test_files_of_the_same_name_in_other_folders_have_others_made_of_them(tmp_path: Path) -> None:
    files = [tmp_path / "first", *(tmp_path / folder / "same" for folder in "ab")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("x")
        os.utime(file, (1, 1))

    def make(file: Any) -> str:
        file.write(bytes(8))
        return "a number"

    made = {made_once.made_once([str(files[0]), str(other)], "zeros", make) for other in files[1:]}
    assert len(made) == 2
    assert all(path.exists() for path in made)


def test_what_is_made_once_may_be_removed_while_it_is_used(tmp_path: Path) -> None:
    for kind, options in ALL[:3]:
        folder = tmp_path / f"{kind}{len(options)}"
        folder.mkdir()
        data = Rows(write(folder, kind), evaluation_fraction=0, **options)
        shutil.rmtree(folder / made_once.FOLDER, ignore_errors=True)
        assert data.__getitems__(range(21)) == rows(0, 21)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"files": 2024}, "data.files=2024 is neither a path nor a list of paths"),
        ({"files": ["a.jsonl", 3]}, r"data.files=\['a.jsonl', 3\] is neither"),
        ({"columns": "id"}, "data.columns='id' must be a list of names"),
        ({"columns": {"x": 3}}, "data.columns={'x': 3} must be a list of names"),
        ({"columns": []}, "data.columns is empty"),
        ({"columns": ["idd"]}, r"a\.jsonl has no column idd. It has id"),
        ({"files": "number.jsonl"}, r"number\.jsonl, row 1 at byte 0 is a int, not an object"),
        ({"files": "parts"}, r"parts is a folder, and none that save_to_disk .*Name its files, as in parts/\*\.jsonl"),
    ],
)
def test_what_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("parts").mkdir()
    Path("a.jsonl").write_text('{"id": 0}\n')
    Path("number.jsonl").write_text("3\n")
    with pytest.raises(UserError, match=message):
        Rows(**{"files": "a.jsonl", "evaluation_fraction": 0, **options})


def test_few_files_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MOST_OPEN", 2)
    for kind, options in ALL[:3]:
        folder = tmp_path / f"{kind}{len(options)}"
        folder.mkdir()
        files, before = write(folder, kind, files=40, each=1), len(os.listdir("/proc/self/fd"))
        data = Rows(files, evaluation_fraction=0, **options)
        assert {row["id"] for row in data.__getitems__([*range(40), 0])} == set(range(40))
        assert len(os.listdir("/proc/self/fd")) - before <= (32 if kind == "jsonl" else 2)


def test_lists_of_lists_need_a_transform(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"x": [[1, 2], [3, 4]]}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, row 1: x is a list of lists. Make a tensor of it by data"):
        Rows(str(path), evaluation_fraction=0)[0]
    data = Rows(str(path), evaluation_fraction=0, transform=lambda row: torch.tensor(row["x"]))
    assert data[0].tolist() == [[1, 2], [3, 4]]


def test_names_and_folders_that_the_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/" + "x" * 300)  # ENAMETOOLONG when it is looked into
    path = tmp_path / ("\N{MANGO}" * 50 + "[0].jsonl")
    path.write_text('{"id": 0}\n')
    assert Rows(str(path), evaluation_fraction=0)[0] == {"id": 0}
    path.write_text('{"id": 0}\n{"id": 1}\n')
    assert len(Rows(str(path), evaluation_fraction=0)) == 2
    assert len(list((tmp_path / made_once.FOLDER).glob("*.row-index"))) == 1


def test_a_decoded_copy_in_other_batches_than_expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As texts of more than 2 GiB make them."""
    files = write(tmp_path, "parquet", files=1, each=21)
    with monkeypatch.context() as small:
        small.setattr(row_files, "_ROWS_OF_BATCH", 2)
        Rows(files, cache=True)
    data = Rows(files, evaluation_fraction=0, cache=True)
    assert data.__getitems__(range(21)) == rows(0, 21)


def test_a_process_keeps_few_row_groups_and_a_copy_needs_none(tmp_path: Path) -> None:
    write(tmp_path, "parquet", files=1, each=5000)
    data = Rows(str(tmp_path / "part0.parquet"), evaluation_fraction=0)
    reads: list[int] = []
    file: Any = data._files[0]
    read = file._row_group
    file._row_group = lambda opened, number: reads.append(number) or read(opened, number)
    data.__getitems__([0, 4999, 1, 4998])
    assert reads == [0, 1666]
    data.__getitems__([2, 4998])
    assert reads == [0, 1666]
    recent = row_files.Recent(1000)
    sizes = [pyarrow.table({"a": [0.0] * 60}) for _ in range(5)]
    for number in (0, 1, 0, 2, 0):
        recent.get(number, lambda number=number: sizes[number])
    assert list(recent._kept) == [2, 0]


def test_categories_have_a_copy_too(tmp_path: Path) -> None:
    column = pyarrow.array(["a", "b", "a", None, "c"]).dictionary_encode()
    parquet.write_table(pyarrow.table({"kind": column, "id": range(5)}), tmp_path / "a.parquet", row_group_size=2)
    data = Rows(str(tmp_path / "a.parquet"), evaluation_fraction=0, cache=True, columns=["kind"])
    assert [data[index]["kind"] for index in range(5)] == ["a", "b", "a", None, "c"]


class Cut:
    """Cuts rows to a number of values, some of them drawn."""

    identity = nn.Identity()  # a common name, which says nothing

    def __init__(self, most: int, **more: Any) -> None:
        self.most = most
        vars(self).update(more)

    def __call__(self, row: dict[str, Any]) -> Any:
        return {"values": torch.rand(len(row["values"][: self.most]) + 1)}


@pytest.mark.parametrize(("kind", "options"), ALL, ids=["jsonl", "parquet", "parquet cached", "saved"])
def test_lengths_are_measured_once_and_again_when_they_may_be_others(
    tmp_path: Path, kind: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "distaccum.data")
    files = write(tmp_path, kind)

    def found(split: str = "train", **more: Any) -> list[int]:
        data = Rows(files, split, **{**options, "evaluation_fraction": 0.25, **more})
        lengths = lengths_of(data)
        loaded = [len(data[index]["values"]) for index in range(len(data))]
        assert lengths.tolist() == loaded
        return loaded

    def made() -> int:
        return caplog.text.count("made the lengths of")

    train = found()
    assert "made the lengths of" in caplog.text
    assert f"{len(train)} samples of {min(train):,} to {max(train):,}; 0.0 s, kept in" in caplog.text
    assert found() == train
    assert made() == 1
    found("evaluation")
    found(evaluation_fraction=0.5)
    assert made() == 3
    for most in (1, 2, 1):
        assert max(found(transform=Cut(most))) == most + 1
    assert made() == 5
    for numbers in ([0, 8], [8, 0]):  # whose sets are in these orders, as one set of texts is in two processes
        found(transform=partial(Cut(1, numbers=set(numbers), of={"it": Cut(1)}, tensor=torch.rand(2))))
    assert made() == 6
    found(transform=partial(Cut(1, numbers={0, 8}, of={"it": Cut(2)})))
    assert made() == 7
    if kind != "saved":
        before = found()
        write(tmp_path, kind, files=2, each=8)
        assert len(found()) != len(before)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', r"a.jsonl, row 2 at byte 9 is no JSON: Expecting value"),
        ("a.jsonl", "{}\n[1]\n", r"a.jsonl, row 2 at byte 3 is a list, not an object"),
        ("a.jsonl", "\n", r"the train data has no row: .*a.jsonl"),
        ("a.parquet", "no parquet", r"a.parquet can't be read"),
        ("a.csv", "a,b\n1,2\n", r"of no known kind. Known endings are .jsonl, .parquet;"),
        ("a.jsonl.gz", "", r"a.jsonl.gz is of no known kind.* Of .jsonl.gz, data=stream reads the lines"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        Rows(str(tmp_path / name), evaluation_fraction=0).__getitems__([1, 0])


def test_by_configuration(tmp_path: Path) -> None:
    saved = write(tmp_path, "saved", files=1).replace("*", "part0")
    files = {kind: write(tmp_path, kind) for kind in ("jsonl", "parquet")}
    transform = ["+data.transform._target_=operator.itemgetter", "+data.transform._args_=[x]"]
    for more in (
        ["data=jsonl", f"data.files={files['jsonl']}"],
        ["data=parquet", f"data.files=[{files['parquet']}]", "data.cache=true"],
        ["data=hf_dataset", f"data.name={saved}"],
    ):
        config = compose([*more, *transform, "data.columns={x:id}", "data.evaluation_fraction=0.25"])
        train, evaluation = (build(getattr(config.data, name), f"data.{name}") for name in ("train", "evaluation"))
        assert [train[0], train[1], train[3], evaluation[0]] == [1, 2, 5, 0]


def test_a_dataset_by_name_with_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    parts = {"train": datasets.Dataset.from_list(rows(0, 20)), "test": datasets.Dataset.from_list(rows(20, 4))}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "both"))
    name = str(tmp_path / "both")
    assert HubDataset(name, columns={"x": "id"}, evaluation_fraction=0)[3] == {"x": 3}
    assert len(HubDataset(name, "evaluation", evaluation_fraction=0.1)) == 2
    evaluation = HubDataset(name, "evaluation", evaluation_split="test")
    assert [row["id"] for row in evaluation.__getitems__([3, 0])] == [23, 20]
    with pytest.raises(UserError, match=r"has no part dev\. It has train, test"):
        HubDataset(name, train_split="dev")
    with pytest.raises(UserError, match=r"has no column idd"):
        HubDataset(name, columns=["idd"])
    with pytest.raises(UserError, match=r"nowhere can't be loaded by datasets"):
        HubDataset(os.path.join(name, "nowhere"))
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.jsonl").write_text('{"id": 5}\n')
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    assert HubDataset(str(tmp_path / "plain"), evaluation_fraction=0)[0] == {"id": 5}
