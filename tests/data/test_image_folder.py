import logging
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from distaccum.data import ImageFolder
from distaccum.data.image_folder import evenly_spread
from distaccum.errors import UserError


def write_image(path: Path, colour: Any = (255, 0, 0), mode: str = "RGB", size: tuple[int, int] = (6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def write_classes(root: Path, **counts: int) -> Path:
    for name, count in counts.items():
        for number in range(count):
            write_image(root / name / f"{number:03}.png")
    return root


def names(data: ImageFolder) -> list[str]:
    return [path.name for path, _ in data.samples]


def test_samples(tmp_path: Path) -> None:
    write_image(tmp_path / "b" / "one.png", (255, 0, 0))
    write_image(tmp_path / "a" / "deep" / "er" / "two.JPG", (0, 0, 255))
    data = ImageFolder("train", tmp_path, image_size=8, mean=(0, 0, 0), std=(1, 1, 1))
    assert data.classes == ["a", "b"]
    assert data.num_classes == 2
    assert data.input_shape == (3, 8, 8)
    assert len(data) == 2
    blue, label = data[0]
    assert label == 0
    assert blue.shape == (3, 8, 8)
    assert blue.dtype == torch.float32
    red, label = data[1]
    assert label == 1
    assert red.mean(dim=(1, 2)).tolist() == [1, 0, 0]


def test_normalisation(tmp_path: Path) -> None:
    write_image(tmp_path / "a" / "one.png", (255, 0, 51))
    data = ImageFolder("train", tmp_path, image_size=1, mean=(0.5, 0.25, 0), std=(0.5, 0.5, 2))
    assert data[0][0].flatten().tolist() == pytest.approx([1, -0.5, 0.1])


@pytest.mark.parametrize(
    ("mode", "colour"), [("L", 255), ("1", 1), ("RGBA", (255, 255, 255, 0)), ("P", 0), ("LA", (255, 9))]
)
def test_every_8_bit_mode_becomes_rgb(tmp_path: Path, mode: str, colour: Any) -> None:
    write_image(tmp_path / "a" / "one.png", colour, mode)
    assert ImageFolder("train", tmp_path, image_size=2)[0][0].shape == (3, 2, 2)


def test_a_part_of_each_class_is_held_out(tmp_path: Path) -> None:
    root = write_classes(tmp_path, a=20, b=2, c=1)
    train, evaluation = (ImageFolder(split, root) for split in ("train", "evaluation"))
    assert names(evaluation) == ["005.png", "015.png", "001.png"]
    assert [label for _, label in evaluation.samples] == [0, 0, 1]
    assert len(train) == 20
    assert not {path for path, _ in train.samples} & {path for path, _ in evaluation.samples}
    assert train.classes == evaluation.classes == ["a", "b", "c"]


def test_the_order_of_the_system_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distaccum.data import image_folder

    root = write_classes(tmp_path, a=7, b=3)
    expected = ImageFolder("evaluation", root).samples
    walk = image_folder.os.walk

    def backwards(*args: Any, **kwargs: Any) -> Any:
        for parent, folders, files in walk(*args, **kwargs):
            yield parent, folders[::-1], sorted(files, reverse=True)

    monkeypatch.setattr(image_folder.os, "walk", backwards)
    assert ImageFolder("evaluation", root).samples == expected


def test_some_image_is_left_to_train_on(tmp_path: Path) -> None:
    root = write_classes(tmp_path, a=4)
    assert len(ImageFolder("train", root, evaluation_fraction=0.99)) == 1
    assert len(ImageFolder("evaluation", root, evaluation_fraction=0.99)) == 3


@given(length=st.integers(1, 500), data=st.data())
def test_evenly_spread(length: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, length))
    places = evenly_spread(length, count)
    assert len(set(places)) == count
    assert all(0 <= place < length for place in places)
    gaps = {after - before for before, after in pairwise(places)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_nothing_is_held_out_at_fraction_0(tmp_path: Path) -> None:
    root = write_classes(tmp_path, a=4)
    assert len(ImageFolder("train", root, evaluation_fraction=0)) == 4
    with pytest.raises(UserError, match=r"evaluation split of .* is empty with evaluation_fraction=0"):
        ImageFolder("evaluation", root, evaluation_fraction=0)


def test_a_folder_of_its_own_for_the_evaluation(tmp_path: Path) -> None:
    root, other = write_classes(tmp_path / "train", a=4, b=4), write_classes(tmp_path / "val", a=1, b=2)
    assert len(ImageFolder("train", root, other)) == 8
    assert len(ImageFolder("evaluation", root, other)) == 3


@pytest.mark.parametrize("split", ["train", "evaluation"])
def test_the_folders_must_have_the_same_classes(tmp_path: Path, split: str) -> None:
    root, other = write_classes(tmp_path / "train", a=1, b=1), write_classes(tmp_path / "val", b=1, c=1)
    with pytest.raises(UserError, match=r"same class folders. Only in root: a. Only in evaluation_root: c."):
        ImageFolder(split, root, other)


def test_other_files_are_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_classes(tmp_path, a=4)
    (root / "a" / "notes.txt").write_text("hello")
    (root / "a" / "labels.csv").write_text("hello")
    (root / "a" / ".hidden.png").write_text("no image")
    (root / ".cache").mkdir()
    # The logger does not pass its messages on while a run has it: listen to it itself.
    logger = logging.getLogger("distaccum.data")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, logger="distaccum.data"):
            train, evaluation = (ImageFolder(split, root) for split in ("train", "evaluation"))
    finally:
        logger.removeHandler(caplog.handler)
    messages = {(record.levelname, record.getMessage()) for record in caplog.records}
    assert messages == {("INFO", f"{root}: 2 files that are not images were left out")}
    assert len(train) + len(evaluation) == 4
    assert train.classes == ["a"]


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"root=.*nowhere does not exist"):
        ImageFolder("train", tmp_path / "nowhere")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match=r"root=.*file is not a folder"):
        ImageFolder("train", file)
    root = write_classes(tmp_path / "root", a=1)
    with pytest.raises(UserError, match=r"evaluation_root=.*nowhere does not exist"):
        ImageFolder("train", root, tmp_path / "nowhere")


def test_no_class_folders(tmp_path: Path) -> None:
    write_image(tmp_path / "one.png")
    with pytest.raises(UserError, match=r"has no folders in it. Images belong in one folder per class"):
        ImageFolder("train", tmp_path)


def test_no_images(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_text("")
    with pytest.raises(UserError, match=r"no images in the class folders of .*\.jpeg .*\.png"):
        ImageFolder("train", tmp_path)


def test_a_class_without_images(tmp_path: Path) -> None:
    write_classes(tmp_path, a=2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no images in class folder .*empty\. Add some"):
        ImageFolder("train", tmp_path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    write_classes(tmp_path, a=1)
    (tmp_path / "a" / "bad.png").write_bytes(b"not a picture")
    cut_off = write_image(tmp_path / "a" / "cut.png", size=(64, 64))
    cut_off.write_bytes(cut_off.read_bytes()[:60])
    data = ImageFolder("train", tmp_path, evaluation_fraction=0)
    with pytest.raises(UserError, match=r"bad\.png cannot be read as an image: cannot identify"):
        data[1]
    with pytest.raises(UserError, match=r"cut\.png cannot be read as an image"):
        data[2]


def test_16_bit_images_are_refused_rather_than_clipped(tmp_path: Path) -> None:
    write_image(tmp_path / "a" / "deep.png", 40000, "I;16")
    with pytest.raises(UserError, match=r"deep\.png .* mode I;16; convert them to 8 bits"):
        ImageFolder("train", tmp_path)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "test"}, "split='test'"),
        ({"evaluation_fraction": 1.0}, "evaluation_fraction=1.0"),
        ({"evaluation_fraction": -0.1}, "evaluation_fraction=-0.1"),
        ({"image_size": 0}, "image_size=0"),
        ({"mean": [0.5]}, "three values each"),
        ({"std": [1, 1, 0]}, "three values each"),
        ({"std": [1, 1, float("nan")]}, "three values each"),
    ],
)
def test_impossible_arguments(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    root = write_classes(tmp_path, a=2)
    with pytest.raises(UserError, match=message):
        ImageFolder(**{"split": "train", "root": root, **change})


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_classes(tmp_path, a=2)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match=r"needs Pillow.*pip install 'distaccum\[examples\]'"):
        ImageFolder("train", root)


# Links


def _splits(root: Path, **arguments: Any) -> list[list[tuple[str, int]]]:
    """What each split has: real paths below the root, and classes."""
    real = root.resolve()
    return [
        [
            (str(path.resolve().relative_to(real)), label)
            for path, label in ImageFolder(split, root, **arguments).samples
        ]
        for split in ("train", "evaluation")
    ]


@pytest.mark.parametrize(("name", "target"), [("again", "."), ("up", ".."), ("above", "../.."), ("deep/back", "..")])
def test_links_that_lead_back_change_nothing(tmp_path: Path, name: str, target: str) -> None:
    root = write_classes(tmp_path / "root", cat=4, dog=4)
    expected = _splits(root, evaluation_fraction=0.5)
    (root / "cat" / name).parent.mkdir(exist_ok=True)
    (root / "cat" / name).symlink_to(target)
    assert _splits(root, evaluation_fraction=0.5) == expected
    assert sum(map(len, expected)) == 8


def test_each_file_counts_once_however_many_links_lead_to_it(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "root", cat=4)
    store = write_classes(tmp_path / "store", more=4) / "more"
    (root / "dog").symlink_to(store)  # of a class, and below one
    (root / "cat" / "first").symlink_to(write_classes(tmp_path, far=2) / "far")
    (root / "cat" / "second").symlink_to(tmp_path / "far")
    (root / "cat" / "copy.png").symlink_to("000.png")
    found = names(ImageFolder("train", root, evaluation_fraction=0))
    assert found == [f"{number:03}.png" for number in (0, 1, 2, 3, 0, 1, 0, 1, 2, 3)]
    train, evaluation = ({path.resolve() for path, _ in ImageFolder(s, root).samples} for s in ("train", "evaluation"))
    assert (len(train | evaluation), train & evaluation) == (10, set())


def test_a_file_of_two_classes_is_refused(tmp_path: Path) -> None:
    root = write_classes(tmp_path, cat=1, dog=2)
    (root / "cat" / "other").symlink_to("../dog")
    with pytest.raises(
        UserError, match=r"cat/other/000.png and .*dog/000.png are the same file, which can't be in both"
    ):
        ImageFolder("train", root)


def test_a_file_of_both_splits_is_refused(tmp_path: Path) -> None:
    root, other = write_classes(tmp_path / "train", a=4), write_classes(tmp_path / "val", a=1)
    (other / "a" / "x.png").symlink_to(root / "a" / "002.png")
    with pytest.raises(UserError, match=r"train/a/002.png and .*val/a/x.png are the same file, which can't be in both"):
        ImageFolder("train", root, other)


# Orientation


def test_images_are_turned_as_their_exif_says(tmp_path: Path) -> None:
    upright = Image.new("RGB", (2, 2), (0, 0, 0))
    upright.putpixel((0, 0), (255, 0, 0))  # above on the left
    for orientation in range(1, 9):
        undone = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL.Image.Transpose, the inverses of those meant
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undone[orientation]))
        path = tmp_path / "a" / f"{orientation}.png"
        path.parent.mkdir(exist_ok=True)
        stored.save(path, exif=exif)
    data = ImageFolder("train", tmp_path, evaluation_fraction=0, image_size=2, mean=(0, 0, 0), std=(1, 1, 1))
    assert [image[0].tolist() for image, _ in (data[index] for index in range(8))] == [[[1, 0], [0, 0]]] * 8
    assert Image.open(tmp_path / "a" / "6.png").getpixel((0, 0)) != (255, 0, 0), "as it is stored"
