"""Runs on each source of data that are killed, also while its index is made, and go on with other ranks."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killing import Order
from reading import ID_TOKEN
from runs import lines_of
from safetensors.torch import load_file
from tar_files import image_bytes, write_images
from zygote import Zygote

from distaccum.checkpoints import MODEL_FILE, checkpoints_in

COUNT = 37
"""Samples of a source."""
RUN = [
    "model=custom",
    "model._target_=reading.Reader",
    "task=custom",
    "task._target_=reading.ById",
    "batch.global_batch_size=8",
    "batch.micro_batch_size=2",
    "optim.lr=0.01",
    "schedule=constant",
    "precision=fp64",
    "train.epochs=2",
    "train.eval_every=3",
    "checkpoint.every_updates=1",
    "checkpoint.async_save=false",
    "run_dir=run",
    "wandb.mode=disabled",
]
MID_EPOCH = Order(point="forward", nth=9)
"""In the third of five windows, with the checkpoints of those before on the disk."""
STRATEGIES = ("strategy=single", "strategy=ddp")
SAMPLE = "{_target_: reading.Sample}"
TRANSFORM = f"data.transform={SAMPLE}"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source of data.

    Attributes:
        write: makes its files in a folder.
        settings: arguments that name them, relative to the folder.
        made: what is made of them once, as the points of `killing.Order` call it.
    """

    write: Callable[[Path], object]
    settings: list[str]
    made: tuple[str, ...] = ()


def _rows(first: int, stop: int) -> list[dict[str, Any]]:
    return [{"id": number, "values": [number / 7] * (1 + number % 5)} for number in range(first, stop)]


def _json_lines(folder: Path) -> None:
    for first, stop in ((0, 20), (20, COUNT)):
        text = "".join(f"{json.dumps(row)}\n" for row in _rows(first, stop))
        (folder / f"rows-{first:02d}.jsonl").write_text(text)


def _parquet(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    for first, stop in ((0, 20), (20, COUNT)):
        table = pyarrow.Table.from_pylist(_rows(first, stop))
        parquet.write_table(table, folder / f"rows-{first:02d}.parquet", row_group_size=6)


def _tar(folder: Path) -> None:
    write_images(folder, (12, 3, 0, 2, 20))


def _tokens(folder: Path) -> None:
    tokens = np.arange(4 * COUNT + 1).astype(np.uint16)
    tokens[: 4 * 32 + 1].tofile(folder / "a.bin")
    tokens[4 * 32 :].tofile(folder / "b.bin")


def _documents(folder: Path) -> None:
    tokens = [token for number in range(COUNT) for token in (ID_TOKEN + number, *[1] * (2 + number % 5), 0)]
    np.array(tokens, np.uint16).tofile(folder / "a.bin")


def _images(folder: Path) -> None:
    for number in range(COUNT):
        path = folder / "images" / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes((number, 0, 0)))


def _saved(folder: Path) -> None:
    import datasets

    datasets.Dataset.from_list(_rows(0, COUNT)).save_to_disk(str(folder / "saved"))


def _lines(folder: Path) -> None:
    """Shards of unequal sizes, one of them empty and one compressed."""
    for number, (first, stop) in enumerate(pairwise((0, 5, 5, 20, 21, COUNT))):
        text = "".join(f"{json.dumps(row)}\n" for row in _rows(first, stop)).encode()
        name = f"{number}.jsonl" + (".gz" if number == 2 else "")
        (folder / name).write_bytes(gzip.compress(text) if number == 2 else text)


def _rows_of(files: str) -> str:
    return f"{{_target_: distaccum.data.Rows, files: {files}, evaluation_fraction: 0, transform: {SAMPLE}}}"


BY_LENGTH = ["batch=by_length", "batch.micro_batch_size=2", "batch.measure_costs=false"]
IMAGES = ["data.image_size=2", "data.mean=[0,0,0]", "data.std=[1,1,1]"]
SOURCES = {
    "jsonl": Source(
        write=_json_lines,
        settings=["data=jsonl", "data.files=rows-*.jsonl", TRANSFORM, *BY_LENGTH],
        made=("rows-#.jsonl.#.#.row-index", "rows-#.jsonl.#.#.lengths"),
    ),
    "parquet": Source(
        write=_parquet,
        settings=["data=parquet", "data.files=rows-*.parquet", "data.cache=true", TRANSFORM],
        made=("rows-#.parquet.#.#.decoded-copy",),
    ),
    "hf_dataset": Source(write=_saved, settings=["data=hf_dataset", "data.name=saved", TRANSFORM]),
    "webdataset": Source(
        write=lambda folder: write_images(folder, (12, 3, 0, 2, 20)),
        settings=["data=webdataset", "data.shards=*.tar", *IMAGES],
        made=("shard-#.tar.#.#.tar-index",),
    ),
    "image_folder": Source(
        write=_images, settings=["data=image_folder", "data.root=images", *IMAGES], made=("images-#.json",)
    ),
    "tokens": Source(
        write=_tokens,
        settings=[
            *("data=tokens", "data.files=a.bin", "data.evaluation_files=b.bin"),
            *("data.max_length=4", "data.vocab_size=1000"),
        ],
    ),
    "tokens, whole documents": Source(
        write=_documents,
        settings=[
            *("data=tokens", "data.files=a.bin", "data.max_length=16", "data.vocab_size=1000", "data.form=labels"),
            *("data.whole_documents=true", "data.end_token=0", "data.evaluation_fraction=0.1"),
            *BY_LENGTH,
        ],
        made=("a.bin.#.#.document-samples",),
    ),
    "mix": Source(
        write=lambda folder: (_json_lines(folder), _parquet(folder)),
        settings=[
            "data=mix",
            f"+data.sources={{lines:{_rows_of('rows-00.jsonl')},groups:{_rows_of('rows-20.parquet')}}}",
            "+data.mix={lines:1,groups:1}",
            *("+data.mix_samples=34", "train.eval_every=null"),
            *BY_LENGTH,
        ],
        made=("rows-#.parquet.#.#.lengths",),
    ),
    "stream": Source(
        write=_lines,
        settings=[
            *("data=stream", "data.files=*.jsonl*", "data.evaluation_samples=4", "data.buffer=16", "data.lanes=3"),
            TRANSFORM,
        ],
        made=("samples-#.json",),
    ),
}


def _killed(processes: Zygote, folder: Path, order: Order, *settings: str, ranks: int) -> None:
    start = processes.start(*RUN, STRATEGIES[ranks > 1], *settings, ranks=ranks, folder=folder, order=order)
    assert start.was_hit, f"{order} was not reached\n{start.output}"
    assert -signal.SIGKILL in start.statuses, f"{start.statuses}\n{start.output}"


def _finished(
    processes: Zygote, folder: Path, *settings: str, ranks: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Weights, and what the metrics say that must not depend on the cut, of a run that goes on to its end."""
    start = processes.start(*RUN, STRATEGIES[ranks > 1], *settings, ranks=ranks, folder=folder)
    assert start.statuses == [0] * ranks, start.output
    of_cuts = ("micro_steps", "sync_calls", "sync_bytes")
    lines = [{key: value for key, value in line.items() if key not in of_cuts} for line in lines_of(folder)]
    return load_file(folder / "run" / MODEL_FILE), lines


def _ids(lines: list[dict[str, Any]]) -> list[set[int]]:
    """The ids of the samples of each update and evaluation, over all ranks."""
    sums = [int(line["eval"]["ids"] if "eval" in line else line["metrics"]["ids"]) for line in lines]
    return [{number for number in range(COUNT) if number_of_them >> number & 1} for number_of_them in sums]


@pytest.mark.parametrize("name", SOURCES)
def test_a_run_that_is_killed_and_moves_loads_the_same(processes: Zygote, tmp_path: Path, name: str) -> None:
    source, (alone, killed, moved) = SOURCES[name], [tmp_path / folder for folder in ("alone", "killed", "moved")]
    for folder in (alone, killed):
        folder.mkdir()
        source.write(folder)
    weights, lines = _finished(processes, alone, *source.settings, ranks=1)
    ids = _ids(lines)
    assert set().union(*ids) == set(range(COUNT))
    # Killed while something is made once, of which others wait for the one that makes it.
    for made in source.made:
        order = Order(point=f"before fsync .{made}.#-#.writing", rank=None)
        _killed(processes, killed, order, *source.settings, ranks=2)
        assert not lines_of(killed)
    # In the middle of the first epoch, with samples of later windows loaded ahead.
    _killed(processes, killed, MID_EPOCH, *source.settings, "data.num_workers=2", ranks=1)
    assert checkpoints_in(killed / "run" / "checkpoints")
    assert not list(killed.glob(".distaccum/.*.writing")), "what was half made is left"
    shutil.copytree(killed, moved, symlinks=True)
    # It goes on with as many ranks as before, and with others.
    same_weights, same_lines = _finished(processes, killed, *source.settings, ranks=1)
    assert same_lines == lines
    assert all(weights[key].equal(same_weights[key]) for key in weights)
    if name in ("jsonl", "stream"):
        _killed(processes, moved, Order(point="forward", nth=4, rank=1), *source.settings, ranks=3)
    moved_weights, moved_lines = _finished(processes, moved, *source.settings, ranks=2)
    assert _ids(moved_lines) == ids
    assert moved_lines == [approximately(line) for line in lines]
    for key, value in weights.items():
        torch.testing.assert_close(moved_weights[key], value, rtol=1e-12, atol=0)


def test_other_samples_are_noticed(processes: Zygote, tmp_path: Path) -> None:
    """Negative control: two rows are exchanged while the run is down, in a file of the same size and time."""
    settings = SOURCES["jsonl"].settings
    _json_lines(tmp_path)
    _killed(processes, tmp_path, MID_EPOCH, *settings, ranks=1)
    shutil.copytree(tmp_path / "run", tmp_path / "before")
    found = [_ids(_finished(processes, tmp_path, *settings, ranks=1)[1])]
    path = tmp_path / "rows-20.jsonl"
    status, rows = path.stat(), path.read_text().splitlines(keepends=True)
    rows[2], rows[12] = rows[12], rows[2]
    path.write_text("".join(rows))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "before").rename(tmp_path / "run")
    found.append(_ids(_finished(processes, tmp_path, *settings, ranks=1)[1]))
    assert found[0] != found[1]


def approximately(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: approximately(entry) for key, entry in value.items()}
    return pytest.approx(value, rel=1e-12, abs=0) if isinstance(value, float) else value
