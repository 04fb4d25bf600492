"""Samples in tar files, as WebDataset has them, read by number."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distaccum.data.images.augment import Augment
from distaccum.data.images.image_files import Pixels, image_extensions, read_rgb
from distaccum.data.images.image_folder import IMAGENET_MEAN, IMAGENET_STD
from distaccum.data.images.mixing import Mixing
from distaccum.data.splits import EVALUATION, TRAIN, HeldOut, check_split
from distaccum.data.storage.files import RangeReader, files_of_splits
from distaccum.data.storage.kept_lengths import kept_lengths
from distaccum.data.storage.object_stores import shown
from distaccum.data.tars.tar_index import LABEL, NO_LABEL, TarIndex, tar_index
from distaccum.data.tars.tar_members import BLOCK, name_at
from distaccum.data.transformed import Transformed
from distaccum.errors import UserError, listed, require

_GAP = 16 << 10
"""Bytes between two members up to which both are read at once."""


class WebDataset(Transformed):
    """Samples of tar files, shuffled fully: an index that is made once says where each one lies.

    What is before the first dot of a member's name is its sample's key, what is after it its extension. The members of
    a sample stand together, as WebDataset's own writer and `tar --sort=name` put them. Keys need only differ within a
    file. Names that begin with a dot are ignored.

    A sample is `(image, label)`: float32 `[3, image_size, image_size]` as `ImageFolder` makes it, and an int; or, with
    `fields`, a dictionary of members. Members are decoded by the last part of their extension: what Pillow opens as an
    image; `cls` an int, `txt` a text, `json`, `npy` a tensor, `pt` and `pth` what `torch.load` returns with
    `weights_only=True`; all else is `bytes`, for a `transform` alone.

    Args:
        shards: paths, patterns or addresses of tar files that are not compressed (see `list_files`).
        split: `train` or `evaluation`.
        evaluation_shards: those to evaluate on. None: a part of the samples of `shards` is held out.
        evaluation_fraction: that part, spread evenly over all.
        image: extensions of the image, of which each sample has one, as in `jpg;png`.
        label: extensions of the label, of which each sample has one. The index holds those of `cls`.
        fields: extensions by the names of a sample's fields, in place of `image` and `label`.
        num_classes: number of classes. None: the largest label in members `cls`, of both splits, and one more.
        transform: is given the sample as above, and returns the sample. Its public attributes (`collate_fn`,
            `num_classes`, …) are the dataset's too.
        image_size: height and width in pixels, and so are the next ones as for `ImageFolder`.

    Attributes:
        num_classes: if it is known.
        input_shape: of images, if there are any.

    Raises:
        UserError: tar files or arguments that don't fit; and from `__getitem__`, a member that can't be decoded.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        split: str = TRAIN,
        *,
        evaluation_shards: str | Sequence[str] | None = None,
        evaluation_fraction: float = 0.05,
        image: str = "jpg;jpeg;png;webp",
        label: str = LABEL,
        fields: Mapping[str, str] | None = None,
        num_classes: int | None = None,
        transform: Callable[[Any], Any] | None = None,
        image_size: int = 64,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        fit: str = "stretch",
        augment: Augment | None = None,
        mixing: Mixing | None = None,
    ) -> None:
        check_split(split, type(self).__name__)
        super().__init__(transform)
        indexes = [tar_index(paths) for paths in files_of_splits(shards, evaluation_shards, "shards").values()]
        self._index = indexes[-1] if split == EVALUATION else indexes[0]
        self._part, self._held_out = TRAIN, HeldOut(0)
        if len(indexes) == 1:
            self._part, self._held_out = split, HeldOut(evaluation_fraction)
        self._count = self._held_out.required(len(self._index), self._part)
        self._is_pair = fields is None
        wanted = {"image": image, "label": label} if fields is None else _checked(fields)
        self._fields = [_field(name, extensions, self._index) for name, extensions in wanted.items()]
        self._pixels = Pixels(image_size, mean, std, fit, augment)
        self._mixing = mixing if mixing is not None and mixing.mixes else None
        require(
            self._is_pair or self._mixing is None,
            "data.fields can't be mixed: mixup and CutMix need samples of an image and a class. Leave data.mixup and "
            "data.cutmix out, or take data.image and data.label.",
        )
        self._reader = RangeReader()
        used = {extension.rpartition(".")[2] for field in self._fields for extension in field.columns}
        unknown = [extension for extension in used if extension not in _DECODERS and not _is_image(extension)]
        if unknown and transform is None:
            raise UserError(
                f"members {listed(sorted(unknown))} can't be decoded: decoded are images, {', '.join(_DECODERS)}. Give "
                "data.transform, which gets their bytes."
            )
        self._set_classes(num_classes, indexes)
        if self._num_classes is not None and not hasattr(self, "num_classes"):  # a transform's own comes first
            self.num_classes = self._num_classes
        if any(map(_is_image, used)) and not hasattr(self, "input_shape"):
            self.input_shape = self._pixels.shape

    def _set_classes(self, num_classes: int | None, indexes: Sequence[TarIndex]) -> None:
        labels = [field for field in self._fields if LABEL in field.columns]
        found = max(index.num_classes for index in indexes) if labels else 0
        for index in indexes if labels else ():
            if index.bad_label:
                raise UserError(f"{index.bad_label} holds no class, an integer from 0 on in decimal.")
        if num_classes is None and not found and self._is_pair:
            raise UserError(f"data.num_classes must be given, as the labels are not in members {LABEL}.")
        if num_classes is not None and found > num_classes:
            raise UserError(f"data.num_classes={num_classes}, and there is the label {found - 1} in the tar files.")
        self._num_classes = num_classes if num_classes is not None else found or None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self._mixing is None:
            return self._load(index)
        return self._mixing(self._load, index, len(self), self.num_classes)

    def find_lengths(self) -> NDArray[np.integer[Any]]:
        """Returns the lengths of the samples: they are measured once, by loading all, and kept beside the tar files.

        Raises:
            UserError: a sample can't be loaded, or has no length.
        """
        fields = [[field.name, list(field.columns)] for field in self._fields]
        depends_on = [fields, self._part, repr(self._held_out), self._pixels.shape]
        return kept_lengths(self, self._index.shards, depends_on, self._transform)

    def _load(self, index: int) -> Any:
        number = self._held_out.place(index, self._part)
        path, row = self._index.shard_of(number), self._index.row(number)
        offsets, sizes = row["offset"], row["size"]
        found: dict[str, Any] = {}
        spans: dict[str, tuple[str, int, int]] = {}
        for field in self._fields:
            extension, column = next(item for item in field.columns.items() if offsets[item[1]])
            if extension == LABEL:
                found[field.name] = int(row["label"])
            else:
                spans[field.name] = extension, int(offsets[column]), int(offsets[column] + sizes[column])
        for name, content in self._contents(path, spans).items():
            found[name] = self._decoded(content, spans[name][0], number, path, spans[name][1])
        place = f"sample {number:,}, in {shown(path)}"
        return self._transformed(
            (found["image"], self._label(found["label"], place)) if self._is_pair else found, place
        )

    def _contents(self, path: str, spans: Mapping[str, tuple[str, int, int]]) -> dict[str, bytes]:
        """Reads members; in one request if they are near to each other."""
        if not spans:
            return {}
        first, last = min(start for _, start, _ in spans.values()), max(stop for *_, stop in spans.values())
        if last - first > sum(stop - start for _, start, stop in spans.values()) + _GAP * len(spans):
            return {name: self._reader.read(path, start, stop) for name, (_, start, stop) in spans.items()}
        content = self._reader.read(path, first, last)
        return {name: content[start - first : stop - first] for name, (_, start, stop) in spans.items()}

    def _decoded(self, content: bytes, extension: str, number: int, path: str, offset: int) -> Any:
        kind = extension.rpartition(".")[2]
        decode = _DECODERS.get(kind)
        if decode is None:
            if not _is_image(kind):
                return content
            try:
                return self._pixels(read_rgb("it", content))
            except UserError as error:
                raise UserError(f"{self._place(number, path, offset)}: {error}") from error
        try:
            return decode(content)
        except Exception as error:  # whatever is in it
            raise UserError(f"{self._place(number, path, offset)} can't be decoded as {kind}: {error}") from error

    def _label(self, label: Any, place: str) -> int:
        try:
            found = int(label)
        except (TypeError, ValueError, RuntimeError):
            found = NO_LABEL
        if self._num_classes is None or not 0 <= found < self._num_classes:
            raise UserError(f"{place} has the label {label!r}, and there are {self._num_classes} classes.")
        return found

    def _place(self, number: int, path: str, offset: int) -> str:
        """Returns which member of a sample begins there, for messages."""
        return f"sample {number:,}, {name_at(self._reader.read(path, offset - BLOCK, offset))} in {shown(path)}"


@dataclass(frozen=True, slots=True)
class _Field:
    """A field of a sample: the extensions that its member may have, with their columns in the index."""

    name: str
    columns: dict[str, int]


def _checked(fields: Any) -> dict[str, str]:
    is_right = isinstance(fields, Mapping) and fields and all(isinstance(value, str) for value in fields.values())
    require(
        bool(is_right),
        f"data.fields={fields!r} must give the extensions of each field by its name, as in {{pixels:jpg,caption:txt}}.",
    )
    return dict(fields)


def _field(name: str, extensions: str, index: TarIndex) -> _Field:
    """Returns a field, of which each sample must have one member."""
    wanted = [extension.strip().lower().removeprefix(".") for extension in str(extensions).split(";")]
    columns = {extension: index.extensions.index(extension) for extension in wanted if extension in index.extensions}
    bits = sum(1 << column for column in columns.values())
    for kind, count, first in index.kinds:
        if (kind & bits).bit_count() != 1:
            has = [extension for column, extension in enumerate(index.extensions) if kind >> column & 1]
            what = "several members" if kind & bits else "no member"
            raise UserError(
                f"data.{name if name in ('image', 'label') else f'fields.{name}'}={extensions}: {count:,} of "
                f"{len(index):,} samples have {what} of these extensions; the first is number {first}, in "
                f"{shown(index.shard_of(first))}, with {', '.join(has)}. Each sample must have one of them."
            )
    return _Field(name, columns)


def _is_image(extension: str) -> bool:
    return extension not in _DECODERS and f".{extension}" in image_extensions()


def _tensor(content: bytes) -> torch.Tensor:
    return torch.from_numpy(np.load(io.BytesIO(content), allow_pickle=False))


def _tensors(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


_DECODERS: dict[str, Callable[[bytes], Any]] = {
    LABEL: int,
    "txt": bytes.decode,
    "json": json.loads,
    "npy": _tensor,
    "pt": _tensors,
    "pth": _tensors,
}
