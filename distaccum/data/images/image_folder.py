"""Images on disk, in one folder per class."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from distaccum.config.enums import OnDamaged
from distaccum.data.images.augment import Augment
from distaccum.data.images.image_files import Pixels, image_extensions, read_rgb
from distaccum.data.images.image_index import ImageIndex, image_index
from distaccum.data.images.mixing import Mixing
from distaccum.data.splits import EVALUATION, TRAIN, check_split
from distaccum.errors import UserError, listed, require

logger = logging.getLogger("distaccum.data")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_LAYOUT = "Images belong in one folder per class: ROOT/CLASS/image.png"


class ImageFolder(Dataset[tuple[Tensor, int | Tensor]]):
    """Classifies the images of `root/CLASS/**`; a class is the place of its folder in the sorted list of folders.

    All files whose extension Pillow knows count, at any depth; the number of other files is logged. Names that begin
    with a dot are ignored. Links are followed, and a file counts once in a class; a file of two classes is refused.
    Without an `evaluation_root`, a part of each class is held out: spread evenly over its sorted files, and at least
    one file of a class that has two. The split doesn't depend on the order in which the system lists the files.

    What folders hold is kept in `~/.cache/distaccum` and listed again when a folder's time has changed. Images are read
    once before anything is trained, so that damaged ones are found; files that were replaced in place, under a
    folder of the same time, are not looked at again.

    A sample is an image, float32 `[3, image_size, image_size]`, and its class, an int. The image is turned as its EXIF
    orientation says, converted to RGB, resized to a square with bilinear interpolation, scaled to [0, 1], and
    normalised by `(pixel - mean) / std`.

    Args:
        split: `train` or `evaluation`.
        root: folder of class folders.
        evaluation_root: folder of class folders of the same names to evaluate on; then all of `root` is for training.
        evaluation_fraction: fraction of each class to hold out when there is no `evaluation_root`, in [0, 1).
        image_size: height and width in pixels.
        mean: subtracted from the three channels.
        std: the three channels are divided by it.
        fit: `stretch` to a square, or `crop` the middle square.
        augment: random changes of an image, drawn from the global generator of `random`.
        mixing: mixes each image with another one; its class is then a tensor of probabilities, float32 `[classes]`.
        on_damaged: `stop` refuses a folder in which an image can't be read; `skip` leaves those out, and logs which;
            `late` doesn't look beforehand, so that such an image is refused when it is loaded.

    Attributes:
        classes: names of the classes.
        num_classes: number of classes.
        input_shape: `(3, image_size, image_size)`.

    Raises:
        UserError: impossible arguments, class folders that are missing or empty, images that can't be read, or Pillow
            is not installed; and from `__getitem__`, an image that can't be read.
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
        fit: str = "stretch",
        augment: Augment | None = None,
        mixing: Mixing | None = None,
        on_damaged: str = "stop",
    ) -> None:
        check_split(split, type(self).__name__)
        require(
            0 <= evaluation_fraction < 1, f"ImageFolder: evaluation_fraction={evaluation_fraction} must lie in [0, 1)."
        )
        self._pixels = Pixels(image_size, mean, std, fit, augment)
        require(
            on_damaged in list(OnDamaged), f"ImageFolder: on_damaged={on_damaged} is none of {', '.join(OnDamaged)}."
        )
        root = Path(root)
        self.classes = _class_names(root, "root")
        self.num_classes = len(self.classes)
        self.input_shape = self._pixels.shape
        self.mean, self.std = tuple(mean), tuple(std)
        self._mixing = mixing if mixing is not None and mixing.mixes else None
        files = self._files(split, root, evaluation_root, evaluation_fraction, OnDamaged(on_damaged))
        self._paths = [path for paths in files for path in paths.values()]
        self._labels = [label for label, paths in enumerate(files) for _ in paths]
        if not self._paths:
            raise UserError(
                f"ImageFolder: the {split} split of {root} is empty with evaluation_fraction={evaluation_fraction:g}. "
                "Give a larger evaluation_fraction, an evaluation_root, or no evaluation (data.evaluation=null)."
            )

    @property
    def samples(self) -> list[tuple[Path, int]]:
        """Path and class of each sample."""
        return [(Path(path), label) for path, label in zip(self._paths, self._labels, strict=True)]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor]:
        if self._mixing is None:
            return self._load(index)
        return self._mixing(self._load, index, len(self), self.num_classes)

    def _load(self, index: int) -> tuple[Tensor, int]:
        return self._pixels(read_rgb(self._paths[index])), self._labels[index]

    def _files(
        self,
        split: str,
        root: Path,
        evaluation_root: str | os.PathLike[str] | None,
        evaluation_fraction: float,
        on_damaged: OnDamaged,
    ) -> list[dict[str, str]]:
        """Returns the split's images of each class, their paths by their real paths."""
        if evaluation_root is None:
            # Both splits list the same folder; only one of them logs.
            files, damaged = _found(root, self.classes, on_damaged, log=split == TRAIN)
            files = [_part(paths, split, evaluation_fraction) for paths in files]
        else:
            evaluation_root = Path(evaluation_root)
            _check_same_classes(root, self.classes, evaluation_root)
            own = evaluation_root if split == EVALUATION else root
            files, damaged = _found(own, self.classes, on_damaged, log=True)
            if split == TRAIN:
                _check_apart(files + _found(evaluation_root, self.classes, OnDamaged.late, log=False)[0])
        if not damaged:
            return files
        # Left out after the split, so that no image changes sides for another one's damage.
        return [{real: path for real, path in paths.items() if real not in damaged} for paths in files]


def evenly_spread(length: int, count: int) -> list[int]:
    """Returns `count` places in `range(length)`, evenly spread: the middles of as many equal parts."""
    return [(2 * place + 1) * length // (2 * count) for place in range(count)]


def _part(paths: dict[str, str], split: str, evaluation_fraction: float) -> dict[str, str]:
    """Returns one class's files of one split."""
    count = 0
    if evaluation_fraction > 0 and len(paths) >= 2:
        count = min(max(1, round(evaluation_fraction * len(paths))), len(paths) - 1)
    held_out = set(evenly_spread(len(paths), count))
    return {real: paths[real] for place, real in enumerate(paths) if (place in held_out) == (split == EVALUATION)}


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


def _check_apart(folders: Sequence[dict[str, str]]) -> None:
    """Refuses a file that is in two of them, by links."""
    seen: dict[str, str] = {}
    for real, path in (item for paths in folders for item in paths.items()):
        if (other := seen.setdefault(real, path)) is not path:
            raise UserError(f"ImageFolder: {other} and {path} are the same file, which can't be in both: remove one.")


def _found(
    root: Path, classes: list[str], on_damaged: OnDamaged, *, log: bool
) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Returns the sorted images of each class folder, their paths by their real paths, and the reasons why some can't
    be read, by real path; `log`: logs the number of files that are left out.

    Raises:
        UserError: no images at all, none in one of the folders, or the same one in two; some can't be read, with
            `on_damaged=stop`.
    """
    damaged: dict[str, str] = {}
    with image_index(root) as index:
        files = _images_by_class(index, root, classes, log=log)
        if on_damaged is not OnDamaged.late:
            damaged = index.damaged()
    paths = {real: path for images in files for real, path in images.items() if real in damaged}
    if not paths:
        return files, {}
    reasons = listed([f"{path}: {damaged[real]}" for real, path in paths.items()], most=10)
    count = f"{len(paths)} of {sum(map(len, files))} images of {root} can't be read"
    if on_damaged is OnDamaged.stop:
        raise UserError(
            f"ImageFolder: {count}: {reasons}. Replace or remove them, leave them out with on_damaged=skip "
            "(data.on_damaged=skip), or don't look beforehand (late)."
        )
    if log:
        logger.info("%s and are left out: %s", count, reasons)
    return files, damaged


def _images_by_class(index: ImageIndex, root: Path, classes: list[str], *, log: bool) -> list[dict[str, str]]:
    extensions = image_extensions()
    others = 0
    files: list[dict[str, str]] = []
    for name in classes:
        found = index.files_below(str(root / name))
        images = {real: path for real, path in found if os.path.splitext(path)[1].lower() in extensions}
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
