"""Images on disk, in one folder per class."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from distaccum.data.splits import EVALUATION, TRAIN, check_split
from distaccum.errors import UserError, not_importable, require

logger = logging.getLogger("distaccum.data")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_LAYOUT = "Images belong in one folder per class: ROOT/CLASS/image.png"


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Classifies the images of `root/CLASS/**`; a class is the place of its folder in the sorted list of folders.

    All files whose extension Pillow knows count, at any depth; the number of other files is logged. Names that begin
    with a dot are ignored. Links are followed, and a file counts once in a class; a file of two classes is refused.
    Without an `evaluation_root`, a part of each class is held out: spread evenly over its sorted files, and at least
    one file of a class that has two. The split doesn't depend on the order in which the system lists the files.

    A sample is an image, float32 `[3, image_size, image_size]`, and its class, an int. The image is turned as its EXIF
    orientation says, converted to RGB, resized to a square with bilinear interpolation (its proportions are not kept),
    scaled to [0, 1], and normalised by `(pixel - mean) / std`.

    Args:
        split: `train` or `evaluation`.
        root: folder of class folders.
        evaluation_root: folder of class folders of the same names to evaluate on; then all of `root` is for training.
        evaluation_fraction: fraction of each class to hold out when there is no `evaluation_root`, in [0, 1).
        image_size: height and width in pixels.
        mean: subtracted from the three channels.
        std: the three channels are divided by it.

    Attributes:
        classes: names of the classes.
        num_classes: number of classes.
        input_shape: `(3, image_size, image_size)`.
        samples: path and class of each sample.

    Raises:
        UserError: impossible arguments, class folders that are missing or empty, or Pillow is not installed; and from
            `__getitem__`, an image that can't be read.
    """

    def __init__(
        self,
        split: str,
        root: str | os.PathLike[str],
        evaluation_root: str | os.PathLike[str] | None = None,
        evaluation_fraction: float = 0.1,
        image_size: int = 64,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        check_split(split, type(self).__name__)
        _check_arguments(evaluation_fraction, image_size, mean, std)
        root = Path(root)
        self.classes = _class_names(root, "root")
        self.num_classes = len(self.classes)
        self.input_shape = (3, image_size, image_size)
        self._image_size = image_size
        self._mean = torch.tensor(mean, dtype=torch.float32).view(3, 1, 1)
        self._std = torch.tensor(std, dtype=torch.float32).view(3, 1, 1)
        if evaluation_root is not None:
            evaluation_root = Path(evaluation_root)
            _check_same_classes(root, self.classes, evaluation_root)
            files = _images_by_class(evaluation_root if split == EVALUATION else root, self.classes, log=True)
            if split == TRAIN:
                _check_apart(files + _images_by_class(evaluation_root, self.classes, log=False))
        else:
            # Both splits list the same folder; only one of them logs the other files.
            files = _images_by_class(root, self.classes, log=split == TRAIN)
            files = [_part(paths, split, evaluation_fraction) for paths in files]
        self.samples = [(path, label) for label, paths in enumerate(files) for path in paths.values()]
        if not self.samples:
            raise UserError(
                f"ImageFolder: the {split} split of {root} is empty with evaluation_fraction={evaluation_fraction:g}. "
                "Give a larger evaluation_fraction, an evaluation_root, or no evaluation (data.evaluation=null)."
            )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        pixels = _read(path, self._image_size)
        return (pixels - self._mean) / self._std, label


def evenly_spread(length: int, count: int) -> list[int]:
    """Returns `count` places in `range(length)`, evenly spread: the middles of as many equal parts."""
    return [(2 * place + 1) * length // (2 * count) for place in range(count)]


def _part(paths: dict[str, Path], split: str, evaluation_fraction: float) -> dict[str, Path]:
    """Returns one class's files of one split."""
    count = 0
    if evaluation_fraction > 0 and len(paths) >= 2:
        count = min(max(1, round(evaluation_fraction * len(paths))), len(paths) - 1)
    held_out = set(evenly_spread(len(paths), count))
    return {real: paths[real] for place, real in enumerate(paths) if (place in held_out) == (split == EVALUATION)}


def _check_arguments(evaluation_fraction: float, image_size: int, mean: Sequence[float], std: Sequence[float]) -> None:
    require(0 <= evaluation_fraction < 1, f"ImageFolder: evaluation_fraction={evaluation_fraction} must lie in [0, 1).")
    require(image_size >= 1, f"ImageFolder: image_size={image_size} is impossible: it must be at least 1.")
    if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
        raise UserError(
            f"ImageFolder: mean={list(mean)} and std={list(std)} must have three values each, one per channel, "
            "and those of std must be greater than 0."
        )


def _class_names(root: Path, argument: str) -> list[str]:
    """Returns the sorted names of the class folders. `argument` is the name of the root's argument, for messages."""
    if not root.exists():
        raise UserError(f"ImageFolder: {argument}={root} does not exist (looked for {root.absolute()}). {_LAYOUT}")
    if not root.is_dir():
        raise UserError(f"ImageFolder: {argument}={root} is not a folder. {_LAYOUT}")
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(f"ImageFolder: {argument}={root} has no folders in it. {_LAYOUT}")
    return names


def _check_same_classes(root: Path, classes: list[str], evaluation_root: Path) -> None:
    evaluation_classes = _class_names(evaluation_root, "evaluation_root")
    if classes != evaluation_classes:
        only_root = sorted(set(classes) - set(evaluation_classes))
        only_evaluation = sorted(set(evaluation_classes) - set(classes))
        raise UserError(
            f"ImageFolder: root={root} and evaluation_root={evaluation_root} must have the same class folders. "
            f"Only in root: {', '.join(only_root) or 'none'}. "
            f"Only in evaluation_root: {', '.join(only_evaluation) or 'none'}."
        )


def _check_apart(folders: Sequence[dict[str, Path]]) -> None:
    """Refuses a file that is in two of them, by links."""
    seen: dict[str, Path] = {}
    for real, path in (item for paths in folders for item in paths.items()):
        if (other := seen.setdefault(real, path)) is not path:
            raise UserError(f"ImageFolder: {other} and {path} are the same file, which can't be in both: remove one.")


def _images_by_class(root: Path, classes: list[str], *, log: bool) -> list[dict[str, Path]]:
    """Returns the sorted image files of each class folder, by their real paths; `log`: logs the number of others.

    Raises:
        UserError: no images at all, none in one of the folders, or the same one in two.
    """
    pillow = _pillow_image()
    extensions = {extension for extension, name in pillow.registered_extensions().items() if name in pillow.OPEN}
    others = 0
    files: list[dict[str, Path]] = []
    for name in classes:
        found = _files_below(root / name)
        images = {real: path for real, path in found.items() if path.suffix.lower() in extensions}
        others += len(found) - len(images)
        files.append(images)
    looked_for = f"Looked for files that end in {' '.join(sorted(extensions))}"
    if not any(files):
        raise UserError(f"ImageFolder: there are no images in the class folders of {root}. {looked_for}")
    empty = [name for name, images in zip(classes, files, strict=True) if not images]
    if empty:
        raise UserError(
            f"ImageFolder: no images in class folder {', '.join(str(root / name) for name in empty)}. "
            f"Add some or remove the folder. {looked_for}"
        )
    _check_apart(files)
    if others and log:
        logger.info("%s: %d files that are not images were left out", root, others)
    return files


def _files_below(folder: Path) -> dict[str, Path]:
    """Returns all files at any depth, sorted, by their real paths; follows links, but no name that begins with a
    dot."""
    found: dict[str, Path] = {}
    start, seen = folder.resolve(), set[Path]()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = Path(parent).resolve()
        if real in seen or real in start.parents:  # a link to a folder that is or was walked through
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = os.path.join(parent, name)
            found.setdefault(os.path.realpath(path) if os.path.islink(path) else f"{real}/{name}", Path(path))
    return dict(sorted(found.items(), key=lambda entry: entry[1]))


def _pillow_image() -> ModuleType:
    try:
        from PIL import Image
    except (ImportError, MemoryError) as error:
        raise not_importable("ImageFolder", "Pillow", error) from error
    return Image


def _read(path: Path, size: int) -> Tensor:
    """Reads an image file as float32 `[3, size, size]` in [0, 1]."""
    image_module = _pillow_image()
    from PIL import ImageOps

    try:
        with image_module.open(path) as image:
            if image.mode.startswith(("I", "F")):
                # Pillow would clip them to 255, which turns nearly all of a 16-bit image white.
                raise ValueError(f"its pixels are of mode {image.mode}; convert them to 8 bits per channel")
            rgb = ImageOps.exif_transpose(image).convert("RGB").resize((size, size), image_module.Resampling.BILINEAR)
    except Exception as error:  # decoders raise all kinds of errors on a damaged file
        raise UserError(f"ImageFolder: {path} cannot be read as an image: {error}") from error
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).float() / 255
