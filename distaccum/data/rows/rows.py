"""Rows of JSON lines, Parquet files and datasets of Hugging Face as samples, read when they are asked for."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distaccum.data.rows.row_files import MOST_DECODED, MOST_OPEN, HubRows, JsonLines, Parquet, Recent, RowFile
from distaccum.data.rows.tables import Row, imported, unknown_kind
from distaccum.data.splits import EVALUATION, TRAIN, HeldOut, check_split
from distaccum.data.storage.files import RangeReader, files_of_splits, is_remote, local
from distaccum.data.storage.kept_lengths import kept_lengths
from distaccum.data.storage.object_stores import shown
from distaccum.data.transformed import Transformed
from distaccum.errors import UserError, listed
from distaccum.loaders.lengths import measured

logger = logging.getLogger("distaccum.data")

Columns = Sequence[str] | Mapping[str, str] | None
"""Names of the columns to read, or of each field of a sample the column that it is."""
Transform = Callable[[Row], Any] | None


class Rows(Transformed):
    """Rows of files as samples: `.jsonl`, `.parquet`, and folders that `save_to_disk` of datasets has written.

    Any row is read without those before it: of JSON lines by an index that is made once, of Parquet by row groups (see
    `Parquet`). A row that can't be read is found when it is asked for, the first one of JSON lines at the start. A
    sample is a dictionary of the row's columns, or what `transform` makes of it. Public attributes of the transform
    (`collate_fn`, `num_classes`, `vocab_size`, …) are the dataset's too.

    Args:
        files: paths, patterns or addresses.
        split: `train` or `evaluation`.
        evaluation_files: files of the evaluation. None: a part of `files` is held out.
        evaluation_fraction: part of the rows to hold out, spread evenly over all of them (see `HeldOut`).
        columns: names of the columns to read, or the columns by the names of the sample's fields. None: all.
        transform: makes a sample of a row.
        cache: of Parquet, read a decoded copy that is made once.

    Raises:
        UserError: the files or the columns aren't there or can't be read.
    """

    def __init__(
        self,
        files: str | Sequence[str],
        split: str = TRAIN,
        *,
        evaluation_files: str | Sequence[str] | None = None,
        evaluation_fraction: float = 0.05,
        columns: Columns = None,
        transform: Transform = None,
        cache: bool = False,
    ) -> None:
        check_split(split, type(self).__name__)
        has_own = evaluation_files is not None
        given = files_of_splits(files, evaluation_files)
        key = "data.evaluation_files" if has_own and split == EVALUATION else "data.files"
        found = _row_files(given[key], key, columns, cache)
        part, fraction = (TRAIN, 0.0) if has_own else (split, evaluation_fraction)
        self._fill(found, split, part, fraction, columns, transform)

    def _fill(
        self,
        files: Sequence[RowFile],
        split: str,
        part: str,
        fraction: float,
        columns: Columns,
        transform: Transform,
    ) -> None:
        super().__init__(transform)
        self._files = files
        self._ends = np.array([0, *accumulate(len(file) for file in files)])
        self._part, self._held_out = part, HeldOut(fraction)
        self._count = self._held_out.required(int(self._ends[-1]), part)
        self._fields = dict(columns) if isinstance(columns, Mapping) else {name: name for name in columns or ()}
        if not len(self):
            raise UserError(f"the {split} data has no row: {listed([shown(file.path) for file in files], 6)}.")
        held_out = f" of {int(self._ends[-1]):,}, the others are held out" if len(self) < self._ends[-1] else ""
        logger.info("%s data: %s rows%s, in %d files", split, f"{len(self):,}", held_out, len(files))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.__getitems__([index % len(self)])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Returns samples by their numbers; rows of one file are read together."""
        rows = self._held_out.place(np.asarray(indices, dtype=np.int64), self._part)
        owners = np.searchsorted(self._ends, rows, side="right") - 1
        found: list[Any] = [None] * len(rows)
        for owner in np.unique(owners).tolist():
            places, file = np.flatnonzero(owners == owner), self._files[owner]
            numbers = (rows[places] - self._ends[owner]).tolist()
            for place, number, row in zip(places.tolist(), numbers, file.rows(numbers), strict=True):
                found[place] = self._sample(file.path, number, row)
        return found

    def find_lengths(self) -> NDArray[np.integer[Any]]:
        """Returns the lengths of the samples: they are measured once, by loading all, and kept beside the files.

        Raises:
            UserError: a sample can't be loaded, or has no length.
        """
        sources = [source for file in self._files for source in file.sources]
        if not all(file.sources for file in self._files):  # a dataset that is in memory alone
            return np.concatenate([lengths for _, lengths in sorted(measured(self), key=itemgetter(0))])
        parts = [file.path for file in self._files if isinstance(file, HubRows)]
        depends_on = [list(self._fields.items()), self._part, repr(self._held_out), parts]
        return kept_lengths(self, sources, depends_on, self._transform)

    def _sample(self, path: str, number: int, row: Row) -> Any:
        if self._fields:
            if missing := [column for column in self._fields.values() if column not in row]:
                raise UserError(
                    f"{shown(path)}, row {number + 1} has no column {missing[0]}. It has "
                    f"{listed(sorted(map(str, row)), 12)}."
                )
            row = {name: row[column] for name, column in self._fields.items()}
        if self._transform is None:
            for name, value in row.items():
                if isinstance(value, list) and value and isinstance(value[0], list):
                    raise UserError(
                        f"{shown(path)}, row {number + 1}: {name} is a list of lists. Make a tensor of it by "
                        "data.transform."
                    )
        return self._transformed(row, f"{shown(path)}, row {number + 1}")


class HubDataset(Rows):
    """Rows of a dataset of Hugging Face's, by its name on the hub or a folder that `save_to_disk` has written.

    Args:
        name: of the dataset; or of the packaged builder or folder that `datasets.load_dataset` takes.
        split: `train` or `evaluation`.
        subset: name of the dataset's configuration.
        train_split: name of its part to train on; slices as `train[:10%]` are datasets' own, and not for folders.
        evaluation_split: name of its part to evaluate on. None: a part of `train_split` is held out.
        evaluation_fraction, columns, transform: as for `Rows`.

    Raises:
        UserError: it can't be loaded, or lacks a part or a column.
    """

    def __init__(
        self,
        name: str,
        split: str = TRAIN,
        *,
        subset: str | None = None,
        train_split: str = "train",
        evaluation_split: str | None = None,
        evaluation_fraction: float = 0.05,
        columns: Columns = None,
        transform: Transform = None,
    ) -> None:
        check_split(split, type(self).__name__)
        has_own = evaluation_split is not None
        wanted = evaluation_split if evaluation_split is not None and split == EVALUATION else train_split
        file = HubRows(f"{name} ({wanted})", _with_columns(name, _loaded(name, subset, wanted), columns))
        part, fraction = (TRAIN, 0.0) if has_own else (split, evaluation_fraction)
        self._fill([file], split, part, fraction, columns, transform)


def _row_files(paths: Sequence[str], key: str, columns: Columns, is_cached: bool) -> list[RowFile]:
    names = _names(columns)
    reader, opened = RangeReader(), Recent(MOST_OPEN)

    def file_of(path: str) -> RowFile:
        ending = os.path.splitext(path.partition("?")[0] if is_remote(path) else path)[1].lower()
        if not is_remote(path) and os.path.isdir(local(path)):
            return HubRows(path, _with_columns(path, _saved(path, key), columns))
        if ending == ".jsonl":
            return JsonLines(path, names, reader)
        if ending == ".parquet":
            return Parquet(path, names, is_cached, opened)
        raise unknown_kind(key, path, [".jsonl", ".parquet"])

    with ThreadPoolExecutor(32) as pool:  # a store answers many at a time
        found = list((pool.map if any(map(is_remote, paths)) else map)(file_of, paths))
    if (size := sum(getattr(file, "decoded_bytes", 0) for file in found)) > MOST_DECODED:
        logger.warning(
            "%s: the row groups are %.1f GB when decoded, of which each process keeps %.2f: in a shuffled order most "
            "samples cost the decoding of a row group. data.cache=true makes a copy once in which none is needed.",
            *(key, size / 1e9, MOST_DECODED / 1e9),
        )
    return found


def _loaded(name: str, subset: str | None, split: str | None) -> Any:
    """Returns a dataset of Hugging Face's, in the form of a table."""
    datasets = imported("datasets", "datasets")
    try:
        is_saved = os.path.isdir(name) and any(
            os.path.exists(os.path.join(name, file)) for file in ("state.json", "dataset_dict.json")
        )
        found = datasets.load_from_disk(name) if is_saved else datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # of many kinds, by the hub's and the builders' own code
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{name} can't be loaded by datasets: {type(error).__name__}: {reason}. Give a name on the Hugging Face "
            "hub, or a folder that save_to_disk has written."
        ) from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise UserError(f"{name} has no part {split}. It has {listed(list(found), 8)}.")
        return found[split]
    if is_saved and split not in (None, "train"):
        raise UserError(f"{name} is one dataset without parts: it has no {split}. Leave that split out.")
    return found


def _saved(path: str, key: str) -> Any:
    """Returns the dataset that a folder holds."""
    folder = local(path)
    if not os.path.isfile(os.path.join(folder, "state.json")):
        raise UserError(
            f"{key}: {path} is a folder, and none that save_to_disk of datasets has written for one part (which has a "
            f"state.json). Name its files, as in {os.path.join(path, '*.jsonl')}; or the folder of one of its parts."
        )
    return _loaded(folder, None, None)


def _names(columns: Columns) -> list[str] | None:
    """Returns the names of the columns to read; None for all."""
    if columns is None:
        return None
    names = list(columns.values()) if isinstance(columns, Mapping) else columns
    if not isinstance(names, Sequence) or isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise UserError(f"data.columns={columns!r} must be a list of names, or give the columns by the fields' names.")
    if not names:
        raise UserError("data.columns is empty. Name at least one, or leave it out for all.")
    return list(dict.fromkeys(names))


def _with_columns(name: str, dataset: Any, columns: Columns) -> Any:
    if (wanted := _names(columns)) is None:
        return dataset
    if missing := [column for column in wanted if column not in dataset.column_names]:
        raise UserError(
            f"data.columns: {name} has no column {missing[0]}. It has {listed(sorted(dataset.column_names), 12)}."
        )
    return dataset.select_columns(wanted)
