"""Each source of data, on real ranks: see `sources.assert_exact`. A new source is one more function here."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sources import COUNT, Source, assert_exact
from tar_files import write_images
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from distaccum.data import Lines, Mix, Rows, Stream, TokenData, WebDataset
from distaccum.planning import shuffled
from distaccum.runtime.randomness import derived_seed
from distaccum.runtime.world import World


def check_a_list(world: World) -> None:
    assert_exact(world, Source(open=lambda folder: [{"id": number} for number in range(COUNT)]))


def _rows(first: int, stop: int) -> list[dict[str, Any]]:
    return [{"id": number, "text": str(number), "values": [0.5] * (1 + number % 5)} for number in range(first, stop)]


def _json_lines(folder: Path) -> None:
    for first, stop in ((0, 20), (20, 21), (21, COUNT)):
        lines = [json.dumps(row) + "\n" for row in _rows(first, stop)]
        Path(folder, f"rows-{first:02d}.jsonl").write_text("".join(lines))


def check_json_lines(world: World) -> None:
    pattern = "rows-*.jsonl"
    assert_exact(
        world, Source(write=_json_lines, open=lambda folder: Rows(str(folder / pattern), evaluation_fraction=0))
    )


def _parquet(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    for first, stop in ((0, 20), (20, COUNT)):
        table = pyarrow.Table.from_pylist(_rows(first, stop))
        parquet.write_table(table, folder / f"rows-{first:02d}.parquet", row_group_size=6)


def check_parquet(world: World) -> None:
    for cache in (False, True):

        def opened(folder: Path, cache: bool = cache) -> Rows:
            return Rows(str(folder / "*.parquet"), evaluation_fraction=0, columns=["values", "id"], cache=cache)

        assert_exact(world, Source(write=_parquet, open=opened))


def check_tar_files(world: World) -> None:
    """The id of a sample is the red of its image; two of the five files are smaller than a window, one is empty."""
    plain = {"image_size": 2, "mean": (0, 0, 0), "std": (1, 1, 1)}
    source = Source(
        write=lambda folder: write_images(folder, (12, 3, 0, 2, 20)),
        open=lambda folder: WebDataset(f"{folder}/*.tar", evaluation_fraction=0, **plain),
        ids=lambda batch: (batch[0][:, 0, 0, 0] * 255).round().int().tolist(),
    )
    assert_exact(world, source)


def _write_lines(folder: Path) -> None:
    """Shards of unequal sizes, one of them empty and one compressed."""
    for number, (first, stop) in enumerate(pairwise((0, 5, 5, 20, 21, COUNT))):
        lines = "".join(f'{{"id": {sample}}}\n' for sample in range(first, stop)).encode()
        name = f"{number}.jsonl" + (".gz" if number == 2 else "")
        (folder / name).write_bytes(gzip.compress(lines) if number == 2 else lines)


def check_a_stream_of_lines(world: World) -> None:
    def opened(folder: Path) -> Stream:
        return Stream(Lines(str(folder / "*.jsonl*")), num_samples=COUNT, buffer=16, lanes=3, seed=5)

    assert_exact(world, Source(write=_write_lines, open=opened))


class _DividedByWorker(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        return ({"id": number} for number in range(info.id if info else 0, COUNT, info.num_workers if info else 1))


def check_a_stream_of_an_iterable_dataset(world: World) -> None:
    assert_exact(world, Source(open=lambda folder: Stream(_DividedByWorker(), num_samples=COUNT, buffer=16)))


def _token_files(folder: Path) -> None:
    """Tokens that count up from 0, as nanoGPT, numpy and llm.c write them; samples lie across the ends of files."""
    tokens = np.arange(4 * COUNT + 1)
    tokens[:50].astype(np.uint16).tofile(folder / "a.bin")
    np.save(folder / "b.npy", tokens[50:51].astype(np.uint32))
    header = np.array([20240520, 1, len(tokens) - 51] + [0] * 253, np.int32)
    (folder / "c.bin").write_bytes(header.tobytes() + tokens[51:].astype(np.uint16).tobytes())


def check_tokens(world: World) -> None:
    def opened(folder: Path) -> TokenData:
        return TokenData("train", str(folder), max_length=4, vocab_size=1000, evaluation_fraction=0)

    def ids(batch: Any) -> list[int]:
        inputs, targets = batch
        assert (inputs[:, 1:] == targets[:, :-1]).all()
        return (inputs[:, 0] // 4).tolist()

    assert_exact(world, Source(write=_token_files, open=opened, ids=ids))


_DOCUMENT_LENGTHS = [3 + 5 * number % 7 for number in range(COUNT)]


def _documents(folder: Path) -> None:
    for first, stop in ((0, 20), (20, COUNT)):
        tokens = [token for number in range(first, stop) for token in _document(number)]
        np.array(tokens, np.uint16).tofile(folder / f"{first:02d}.bin")


def _document(number: int) -> list[int]:
    return [100 + number, *[1] * (_DOCUMENT_LENGTHS[number] - 1), 0]


def check_whole_documents(world: World) -> None:
    """By length and packed; all ranks but one wait for the index."""

    def opened(folder: Path) -> TokenData:
        options: dict[str, Any] = {"whole_documents": True, "end_token": 0, "form": "labels", "evaluation_fraction": 0}
        data = TokenData("train", str(folder), max_length=16, vocab_size=1000, **options)
        assert data.lengths.tolist() == [length + 1 for length in _DOCUMENT_LENGTHS]
        return data

    def ids(batch: Any) -> list[int]:
        tokens = batch["input_ids"]
        return (tokens[tokens >= 100] - 100).tolist()

    for packed in (False, True):
        loader = {"packed": packed}
        assert_exact(world, Source(write=_documents, open=opened, ids=ids, loader=loader, by_length=True))


class _Few(list[dict[str, Any]]):
    """A dataset that knows the lengths of its samples."""

    def __init__(self) -> None:
        self.lengths = [1 + number % 5 for number in range(20)]
        super().__init__({"id": 100 + number, "values": [0.5] * length} for number, length in enumerate(self.lengths))


def _mix(folder: Path) -> Mix:
    rows = Rows(str(folder / "rows-*.jsonl"), evaluation_fraction=0, columns=["id", "values"])
    return Mix({"few": _Few(), "rows": rows}, {"few": 0.7, "rows": 0.3}, num_samples=COUNT, seed=5)


def check_a_mix_of_sources(world: World) -> None:
    """Of 26 samples from 20, and 11 from 37."""

    def wanted(epoch: int) -> list[int]:
        few, rows = (range(epoch * count, (epoch + 1) * count) for count in (26, 11))
        order = [shuffled([draw % 20], 20, derived_seed(5, "mix", "few"), draw // 20)[0] + 100 for draw in few]
        return order + [shuffled([draw % 37], 37, derived_seed(5, "mix", "rows"), draw // 37)[0] for draw in rows]

    for by_length in (False, True):
        assert_exact(world, Source(write=_json_lines, open=_mix, wanted=wanted, by_length=by_length))


class _Forwards(Dataset[Any]):
    """Gives its samples in their order, whichever is asked for: right in one process alone, without a restart."""

    def __init__(self) -> None:
        self._asked = -1

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> dict[str, int]:
        self._asked += 1
        return {"id": self._asked % COUNT * (self._asked // COUNT * 2 + 1) % COUNT}


def check_a_sample_that_depends_on_what_was_asked_before(world: World) -> None:
    """The negative control."""
    with pytest.raises(AssertionError, match="2 ranks have other windows"):
        assert_exact(world, Source(open=lambda folder: _Forwards()))
