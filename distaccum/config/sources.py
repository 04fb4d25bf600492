"""Typed sections of data in files and streams."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distaccum.config import MISSING, DataConfig
from distaccum.config.enums import TokenDtype, TokenForm
from distaccum.config.vision import ImageDataConfig
from distaccum.errors import require, require_at_least


@dataclass(kw_only=True, slots=True)
class RowsDataConfig(DataConfig):
    """Rows of JSON lines as samples, found by an index of where they begin."""

    files: Any = MISSING
    """Path, pattern or address of files, or a list of them."""
    evaluation_files: Any = None
    """Files to evaluate on. `null`: a part of `files` is held out."""
    evaluation_fraction: float = 0.05
    """Fraction of the rows to hold out for evaluation when there are no `evaluation_files`, spread evenly over all."""
    columns: Any = None
    """Columns to read, as in `[image,label]`, or what the fields of a sample are called too, as in
    `{pixels:image,labels:label}`. `null`: all."""
    transform: Any = None
    """Component that is called with a row, a dictionary, and returns a sample. `null`: the row is the sample."""


@dataclass(kw_only=True, slots=True)
class ParquetDataConfig(RowsDataConfig):
    """Rows of Parquet files as samples, read by row group."""

    cache: bool = False
    """Read a decoded copy, made once and mapped into memory: without it, a row costs the decoding of its row group
    whenever that is not one of those that a process has decoded last, 256 MB of them."""


@dataclass(kw_only=True, slots=True)
class HubDataConfig(DataConfig):
    """Rows of a dataset of Hugging Face's as samples."""

    name: str = MISSING
    """Its name on the hub, or a folder that `save_to_disk` has written."""
    subset: str | None = None
    """Name of its configuration."""
    train_split: str = "train"
    """Part to train on. Of what isn't a folder of `save_to_disk`, slices as in `train[:10%]` are allowed."""
    evaluation_split: str | None = None
    """Part to evaluate on. `null`: a part of `train_split` is held out."""
    evaluation_fraction: float = 0.05
    """Fraction of the rows to hold out for evaluation when there is no `evaluation_split`, spread evenly over all."""
    columns: Any = None
    """Columns to read, as for `data=jsonl`."""
    transform: Any = None
    """Component that makes a sample of a row, as for `data=jsonl`."""


@dataclass(kw_only=True, slots=True)
class WebDatasetDataConfig(ImageDataConfig):
    """Samples in tar files, found by an index that is made once, and shuffled fully."""

    shards: Any = MISSING
    """Path, pattern or address of tar files, or a list of them, as in `"shards/{000..099}.tar"`, with its quotes. They
    must not be compressed."""
    evaluation_shards: Any = None
    """Tar files to evaluate on. `null`: a part of the samples of `shards` is held out."""
    evaluation_fraction: float = 0.05
    """Fraction of the samples to hold out for evaluation when there are no `evaluation_shards`, spread evenly over
    all."""
    image: str = "jpg;jpeg;png;webp"
    """Extensions of the image; each sample has one of them."""
    label: str = "cls"
    """Extensions of the label; each sample has one of them."""
    fields: Any = None  # a dict[str, str], which OmegaConf can't replace as a whole where it is typed
    """Extensions by the names of a sample's fields, as in `{pixels:jpg,caption:txt}`, in place of `image` and `label`.
    The sample is a dictionary then."""
    num_classes: int | None = None
    """Number of classes. `null`: the largest label in members `cls`, and one more."""
    transform: Any = None
    """Component that is called with a sample, and returns what is used in its place."""


@dataclass(kw_only=True, slots=True)
class StreamDataConfig(DataConfig):
    """Samples that can only be read forwards: lines of files, an iterable dataset, a generator for each shard."""

    files: Any = None
    """Text files of which each line is a sample, by paths, patterns or addresses: one of a `.jsonl` is what it holds as
    JSON, of a `.txt` `{"text": …}`; `.gz` behind it: compressed. `null`: `source` is given."""
    source: Any = None
    """In place of `files`: a component that builds an `IterableDataset` of torch or of Hugging Face's datasets, or
    `distaccum.data.Shards` with a function that opens a shard."""
    transform: Any = None
    """A component that is called with a sample as it was read, on its own rank alone, and returns what a micro-batch
    is made of. `null`: the sample is taken as it is."""
    num_samples: int | None = None
    """Samples in an epoch; what there is beyond is left out. `null`: counted by reading everything once."""
    endless: bool = False
    """Passes follow each other without the end of an epoch; needs `train.max_updates`."""
    shuffle: bool = True
    """Shuffle the shards, and the samples within blocks."""
    buffer: int = 1000
    """Samples of a block. Each process that loads holds up to two blocks, and a run that goes on reads at most one
    again."""
    lanes: int = 8
    """Shards that are read in turn, one sample of each."""
    evaluation_files: Any = None
    """Files to evaluate on, like `files`."""
    evaluation_samples: int | None = None
    """Without `evaluation_files`: samples to evaluate on, held out of the beginning of the first shard."""

    def __post_init__(self) -> None:
        require_at_least(
            1,
            data__num_samples=self.num_samples,
            data__lanes=self.lanes,
            data__evaluation_samples=self.evaluation_samples,
        )
        require(
            not (self.endless and self.num_samples is not None),
            f"data.endless=true and data.num_samples={self.num_samples} contradict each other: leave one of them out.",
        )
        require(
            self.evaluation_files is None or self.evaluation_samples is None,
            "data.evaluation_files and data.evaluation_samples are both given: leave one of them out.",
        )


@dataclass(kw_only=True, slots=True)
class TokensDataConfig(DataConfig):
    """Tokens in files of any size, for language models: pieces of a fixed length, or whole documents."""

    files: Any = MISSING
    """File, pattern or folder, or a list of them: `.bin` as nanoGPT and llm.c write them, one-dimensional `.npy`, or a
    folder that `python -m distaccum.data.tokenize` has made. In other folders, files named as for an evaluation
    (`val.bin`) are taken for it."""
    evaluation_files: Any = None
    """Files to evaluate on. `null`: those of folders that are named so, or else a part of the samples is held out."""
    evaluation_fraction: float = 0.01
    """That part: of the documents, or of blocks of 16 samples of a fixed length."""
    max_length: int = 1024
    """Length of a sample in tokens; with whole documents the largest."""
    whole_documents: bool = False
    """Take documents as samples. Longer ones are cut into several."""
    end_token: int | None = None
    """Token at the end of each document, with `whole_documents`. `null`: files beside those of tokens say where
    documents end."""
    vocab_size: int | None = None
    """Number of the tokenizer's tokens. `null`: as the folder says."""
    dtype: TokenDtype = TokenDtype.uint16
    """Of a token in files that don't say it, which are nanoGPT's: `uint16` or `uint32`."""
    form: TokenForm = TokenForm.targets
    """`targets`: samples are `(inputs, targets)`, for `task=language_modeling` and `model=gpt`; `labels`: they are
    `{input_ids, labels}`, for `task=causal_lm` and models of transformers."""


@dataclass(kw_only=True, slots=True)
class MixDataConfig(DataConfig):
    """Samples of several datasets, mixed by weights."""

    sources: dict[str, Any] = field(default_factory=dict)
    """Components by names of your choice: the datasets to draw from."""
    mix: Any = MISSING
    """Weight of each source, as in `{a:0.7,b:0.3}`: its share of an epoch's samples."""
    mix_samples: int | None = None
    """Samples of an epoch. `null`: as many as the sources have together."""

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        require_at_least(1, data__mix_samples=self.mix_samples)
