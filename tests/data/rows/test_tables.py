from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distaccum.data.rows.tables import rows_of
from distaccum.errors import UserError

ROWS: list[dict[str, Any]] = [{"prompt": "1 + 1?", "completion": "2, ü"}, {"prompt": "a\nb", "completion": '"'}]


def written(folder: Path, kind: str) -> Path:
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\ufeff" + "\n\n".join(map(json.dumps, ROWS)) + "\n", encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "csv":
        path.write_text('prompt,completion\n1 + 1?,"2, ü"\n"a\nb",""""\n', encoding="utf-8")
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        import datasets

        path = folder / "saved"
        datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "dataset"])
def test_each_kind_of_file_has_the_same_rows(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path, kind)
    found = list(rows_of(str(path), "data.files"))
    assert [row for _, row in found] == ROWS
    places = {"jsonl": ["line 1", "line 3"], "json": ["object 1", "object 2"]}.get(kind, ["row 1", "row 2"])
    assert [place for place, _ in found] == [f"{path}, {place}" for place in places]


def test_patterns_are_read_in_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "c.jsonl").write_text('{"text": "c"}')
    found = rows_of([str(tmp_path / "*.jsonl"), str(tmp_path / "*.txt")], "data.files")
    assert [row["text"] for _, row in found] == ["c", "a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', r"a.jsonl, line 2 is no JSON: Expecting value"),
        ("a.jsonl", "[1]\n", r"line 1 is a list, not an object"),
        ("a.json", '{"a": 1}', r"holds a dict, not a list"),
        ("a.csv", "a,b\n1\n", r"row 1 has another number of fields"),
        ("a.csv", "a,b\n1,2,3\n", r"row 1 has another number of fields"),
        ("a.parquet", "no parquet", r"a.parquet can't be read"),
        ("a.xlsx", "", r"no known kind.*\.jsonl"),
        ("a.txt", b"\xff\xfe\xff", r"a.txt can't be read: UnicodeDecodeError"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=message):
        list(rows_of(str(tmp_path / name), "data.files"))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for files in (str(tmp_path / "none.jsonl"), [str(tmp_path / "*.csv")]):
        with pytest.raises(UserError, match=r"^data.files: there is no file .*(none.jsonl|\*.csv)"):
            list(rows_of(files, "data.files"))
    with pytest.raises(UserError, match=r"data.files=\[\] names no file"):
        list(rows_of([], "data.files"))


def test_a_folder_with_several_parts(tmp_path: Path) -> None:
    import datasets

    part = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(UserError, match=r"several parts: name one of .*both/train"):
        list(rows_of(str(tmp_path / "both"), "data.files"))
    assert [row for _, row in rows_of(str(tmp_path / "both" / "train"), "data.files")] == ROWS
