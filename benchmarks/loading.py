"""How many samples a second are loaded, against other loaders on the same files with as many workers?

    python benchmarks/loading.py

  images    JPEG files in folders; the same files in tar shards; the same bytes in litData's own format
  tokens    a file of 16-bit tokens, in samples of 1,024 and the next ones; the same in litData's own format
  rows      a Parquet file of texts and numbers, in row groups of 1,000

`distaccum` is a WindowLoader with windows of 4 micro-batches over the datasets of data=images, webdataset, tokens and
parquet. `DataLoader` is torch's over the same dataset, for tokens over a mapped file as plain loops read it, shuffled
anew each epoch, with torch's own collate; `datasets`, WebDataset and litData load with their own readers. All make the
same tensors of a sample, in batches of one size, with 0, 1 and 2 workers that stay between epochs. All contenders run
in one process, in rounds, each round in another order, after an epoch that doesn't count.

  samples/s        best of the rounds
  of DataLoader's  median of the ratios within the rounds; 1 and more: at least as fast
                   ("DataLoader again" is another one over the same: how far it is from 1 is noise)
  plan %           of distaccum's time, processor time that deciding which samples each micro-batch has takes

Needs the extra: pip install "distaccum[bench]".
"""

from __future__ import annotations

import argparse
import gc
import io
import random
import statistics
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from distaccum.data.images.image_files import Pixels, read_rgb
from distaccum.data.images.image_folder import IMAGENET_MEAN, IMAGENET_STD, ImageFolder
from distaccum.data.rows.rows import Rows
from distaccum.data.tars.webdataset import WebDataset
from distaccum.data.tokens.token_data import TokenData
from distaccum.loaders import LoaderOptions, WindowLoader

OURS, PLAIN, AGAIN = "distaccum", "DataLoader", "DataLoader again"
PER_WINDOW, LENGTH, SHARDS, CLASSES = 4, 1024, 4, 2
WORDS = ("some", "words", "of", "a", "text", "that", "nobody", "reads")
PIXELS = Pixels(64, IMAGENET_MEAN, IMAGENET_STD, "stretch", None)

Epoch = Callable[[], Iterable[Any]]
"""Begins to load one more epoch; returns its batches."""


class MappedTokens(Dataset[Any]):
    """Samples of one length out of a mapped file, and the tokens after each."""

    def __init__(self, path: Path) -> None:
        self._tokens = np.memmap(path, np.uint16, mode="r")

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // LENGTH

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = torch.from_numpy(self._tokens[index * LENGTH : (index + 1) * LENGTH + 1].astype(np.int64))
        return found[:-1], found[1:]


def write_images(folder: Path, count: int) -> None:
    """Writes JPEG files of noise on a gradient, 256 × 256, in class folders and in tar shards."""
    from PIL import Image

    generator = np.random.default_rng(0)
    ramp = np.linspace(0, 200, 256)[:, None, None]
    for label in range(CLASSES):
        (folder / "folders" / str(label)).mkdir(parents=True)
    with ExitStack() as stack:
        shards = [stack.enter_context(tarfile.open(folder / f"{n}.tar", "w")) for n in range(SHARDS)]
        for number in range(count):
            content, label = io.BytesIO(), number % CLASSES
            pixels = ramp + generator.integers(0, 55, (256, 256, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(content, "JPEG", quality=85)
            (folder / "folders" / str(label) / f"{number}.jpg").write_bytes(content.getvalue())
            for name, member in (("jpg", content.getvalue()), ("cls", str(label).encode())):
                entry = tarfile.TarInfo(f"{number:06}.{name}")
                entry.size = len(member)
                shards[number * SHARDS // count].addfile(entry, io.BytesIO(member))


def write_tokens(path: Path, count: int) -> None:
    np.random.default_rng(0).integers(0, 50_000, count * LENGTH + 1).astype(np.uint16).tofile(path)


def write_rows(path: Path, count: int) -> None:
    import pyarrow
    import pyarrow.parquet

    generator = random.Random(0)
    texts = [" ".join(generator.choices(WORDS, k=40)) for _ in range(count)]
    table = pyarrow.table({"text": texts, "label": list(range(count))})
    pyarrow.parquet.write_table(table, path, row_group_size=1000)


def lit_image(path: str) -> dict[str, Any]:
    return {"image": Path(path).read_bytes(), "label": int(Path(path).parent.name)}


def lit_tokens(span: tuple[str, int, int]) -> Iterator[torch.Tensor]:
    path, start, stop = span
    yield torch.from_numpy(np.memmap(path, np.uint16, mode="r")[start:stop].astype(np.int64))


def optimized(make: Any, inputs: list[Any], folder: Path, **options: Any) -> None:
    """Writes litData's format, without what it prints."""
    import litdata

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings(action="ignore"):
        litdata.optimize(make, inputs, str(folder), num_workers=1, start_method="fork", verbose=False, **options)


def ours(dataset: Any, batch: int, workers: int, stack: ExitStack) -> WindowLoader:
    options = LoaderOptions(num_workers=workers, persistent_workers=workers > 0)
    loader = WindowLoader(
        dataset, global_batch_size=PER_WINDOW * batch, micro_batch_size=batch, drop_last=True, options=options
    )
    return stack.enter_context(closing(loader))


def batches_of(loader: WindowLoader) -> Iterator[Any]:
    for window in loader:
        yield from window


def plain(dataset: Any, batch: int, workers: int, *, shuffle: bool | None = True, kind: Any = DataLoader) -> Epoch:
    loader = kind(
        dataset,
        batch_size=batch,
        shuffle=shuffle,
        num_workers=workers,
        persistent_workers=workers > 0,
        drop_last=True,
    )
    return partial(iter, loader)


def of_datasets_images(rows: dict[str, list[Any]]) -> dict[str, Any]:
    pixels = [PIXELS(image.convert("RGB")) for image in rows["image"]]
    return {"image": pixels, "label": rows["label"]}


def of_wds(pair: tuple[bytes, bytes]) -> tuple[torch.Tensor, int]:
    return PIXELS(read_rgb("", pair[0])), int(pair[1])


def of_lit(sample: dict[str, Any]) -> tuple[torch.Tensor, int]:
    return PIXELS(read_rgb("", sample["image"])), sample["label"]


def image_contenders(folder: Path, workers: int) -> dict[str, Epoch]:
    import datasets
    import litdata
    import webdataset

    paths = sorted(map(str, (folder / "folders").rglob("*.jpg")))
    labels = [int(Path(path).parent.name) for path in paths]
    table = datasets.Dataset.from_dict({"image": paths, "label": labels}).cast_column("image", datasets.Image())
    stream = litdata.StreamingDataset(str(folder / "lit"), shuffle=True, transform=of_lit)
    return {
        "datasets": plain(table.with_transform(of_datasets_images), 32, workers),
        "litData": plain(stream, 32, workers, shuffle=None, kind=litdata.StreamingDataLoader),
        "WebDataset": wds_epoch(webdataset, [str(folder / f"{n}.tar") for n in range(SHARDS)], workers),
    }


def wds_epoch(webdataset: Any, shards: list[str], workers: int) -> Epoch:
    pipeline = webdataset.WebDataset(shards, shardshuffle=SHARDS, empty_check=False).shuffle(1000)
    pipeline = pipeline.to_tuple("jpg", "cls").map(of_wds)
    return plain(pipeline, 32, workers, shuffle=None, kind=webdataset.WebLoader)


def token_contenders(folder: Path, workers: int) -> dict[str, Epoch]:
    import litdata

    loader = litdata.streaming.item_loader.TokensLoader(block_size=LENGTH)
    stream = litdata.StreamingDataset(str(folder / "lit"), shuffle=True, item_loader=loader)
    return {"litData": plain(stream, 8, workers, shuffle=None, kind=litdata.StreamingDataLoader)}


def row_contenders(folder: Path, workers: int) -> dict[str, Epoch]:
    import datasets

    table = datasets.Dataset.from_parquet(str(folder / "rows.parquet"), cache_dir=str(folder / "cache"))
    return {"datasets": plain(table, 32, workers)}


def epoch_seconds(epoch: Epoch) -> tuple[float, int]:
    """Returns the seconds that batches take from the first to the last one, and how many come after the first."""
    batches = iter(epoch())
    next(batches)
    started = time.perf_counter()
    count = sum(1 for _ in batches)
    return time.perf_counter() - started, count


def plan_seconds(loader: WindowLoader) -> float:
    """Processor seconds of the plan for a micro-batch."""
    windows = range(loader.sizes.count(5))
    started = time.process_time()
    micro_batches = sum(len(loader.cuts.micro_batches(5, index)) for index in windows)
    return (time.process_time() - started) / micro_batches


def measured(
    what: str,
    dataset: Any,
    batch: int,
    others: Callable[[int], dict[str, Epoch]],
    options: argparse.Namespace,
    reference: Any = None,
) -> Iterator[common.Row]:
    for workers in (0, 1) if options.quick else (0, 1, 2):
        with ExitStack() as stack, redirect_stdout(sys.stderr):  # readers print what they do
            loader = ours(dataset, batch, workers, stack)
            theirs = dataset if reference is None else reference
            contenders = {OURS: partial(batches_of, loader), **others(workers)}
            contenders |= {name: plain(theirs, batch, workers) for name in (PLAIN, AGAIN)}
            rates: dict[str, list[float]] = {name: [] for name in contenders}
            shuffle = random.Random(0)
            for number in common.rounds(2 if options.quick else 6, f"{what}, {workers} workers"):
                for name in shuffle.sample(list(contenders), len(contenders)):
                    seconds, count = epoch_seconds(contenders[name])
                    gc.collect()
                    if number:
                        rates[name].append(count * batch / seconds)
            plan = plan_seconds(loader)
            contenders.clear()
        for name, found in rates.items():
            ratios = [mine / other for mine, other in zip(found, rates[PLAIN], strict=True)]
            yield {
                "files": what,
                "workers": workers,
                "loader": name,
                "samples/s": round(max(found)),
                "of DataLoader's": round(statistics.median(ratios), 3),
                "plan %": round(100 * plan * max(found) / batch, 3) if name == OURS else None,
            }


def rows(options: argparse.Namespace) -> Iterator[common.Row]:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        images, tokens, tables = (root / part for part in ("images", "tokens", "rows"))
        count = 256 if options.quick else 1024
        for folder in (images, tokens, tables):
            folder.mkdir()
        write_images(images, count)
        paths = sorted(map(str, (images / "folders").rglob("*.jpg")))
        optimized(lit_image, paths, images / "lit", chunk_bytes="2MB")
        folders = ImageFolder("train", images / "folders", evaluation_fraction=0.0, on_damaged="late")
        yield from measured("images, folders", folders, 32, partial(image_contenders, images), options)
        with redirect_stdout(sys.stderr):  # where the making of its index is shown
            shards = WebDataset([str(images / "*.tar")], evaluation_fraction=0.0)
        yield from measured("images, tar", shards, 32, lambda workers: {}, options)

        write_tokens(tokens / "tokens.bin", 8 * count)
        size = count * LENGTH
        spans = [(str(tokens / "tokens.bin"), size * part, size * (part + 1)) for part in range(8)]
        import litdata

        item_loader = litdata.streaming.item_loader.TokensLoader(block_size=LENGTH)
        optimized(lit_tokens, spans, tokens / "lit", chunk_bytes="4MB", item_loader=item_loader)
        path = tokens / "tokens.bin"
        data = TokenData("train", str(path), evaluation_fraction=0.0, vocab_size=50_000, max_length=LENGTH)
        yield from measured("tokens", data, 8, partial(token_contenders, tokens), options, MappedTokens(path))

        write_rows(tables / "rows.parquet", 4 * count)
        parquet = Rows([str(tables / "rows.parquet")], evaluation_fraction=0.0)
        yield from measured("rows, Parquet", parquet, 32, partial(row_contenders, tables), options)


def main() -> None:
    parser = common.arguments(__doc__, quick="30 seconds", full="10 minutes")
    options = common.begin(parser)
    found = common.show("Samples a second", rows(options))
    if options.write:
        common.write(__doc__, found)


if __name__ == "__main__":
    main()
