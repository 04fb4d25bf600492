import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from distaccum.data import ImageFolder
from distaccum.data.images.image_folder import evenly_spread
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


Log = Callable[[], list[tuple[str, str]]]


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
    from distaccum.data.images import image_index

    root = write_classes(tmp_path, a=7, b=3)
    expected = ImageFolder("evaluation", root).samples
    scandir = os.scandir

    def backwards(path: str) -> Any:
        with scandir(path) as entries:
            return nullcontext(sorted(entries, key=lambda entry: entry.name, reverse=True))

    monkeypatch.setattr(image_index.os, "scandir", backwards)
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


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[Log]:
    """Returns what the data have logged: levels and messages."""
    # The logger does not pass its messages on while a run has it: listen to it itself.
    logger = logging.getLogger("distaccum.data")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, logger="distaccum.data"):
            yield lambda: [(record.levelname, record.getMessage()) for record in caplog.records]
    finally:
        logger.removeHandler(caplog.handler)


def test_other_files_are_counted_once(tmp_path: Path, log: Log) -> None:
    root = write_classes(tmp_path, a=4)
    (root / "a" / "notes.txt").write_text("hello")
    (root / "a" / "labels.csv").write_text("hello")
    (root / "a" / ".hidden.png").write_text("no image")
    (root / ".cache").mkdir()
    train, evaluation = (ImageFolder(split, root) for split in ("train", "evaluation"))
    assert set(log()) == {
        ("INFO", f"{root}: 2 files that are not images were left out"),
        ("INFO", "looking at 4 images, to find damaged ones (data.on_damaged=late: without)"),
    }
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


# Images that can't be read


def write_damaged(root: Path) -> Path:
    """Two of five can't be read."""
    write_classes(root, a=2, ü=1)
    (root / "a" / "bad.png").write_bytes(b"not a picture")
    cut_off = write_image(root / "ü" / "abgeschnitten ä.png", size=(64, 64))
    cut_off.write_bytes(cut_off.read_bytes()[:60])
    return root


def test_damaged_files_are_named_before_training(tmp_path: Path) -> None:
    root = write_damaged(tmp_path)
    with pytest.raises(UserError) as raised:
        ImageFolder("train", root, evaluation_fraction=0)
    message = str(raised.value)
    assert f"2 of 5 images of {root} can't be read: {root}/a/bad.png: cannot identify image file" in message
    assert f"{root}/ü/abgeschnitten ä.png: " in message
    assert "data.on_damaged=skip" in message


def test_damaged_files_are_named_when_they_are_loaded(tmp_path: Path) -> None:
    data = ImageFolder("train", write_damaged(tmp_path), evaluation_fraction=0, on_damaged="late")
    assert len(data) == 5
    with pytest.raises(UserError, match=r"bad\.png cannot be read as an image: cannot identify"):
        data[2]
    with pytest.raises(UserError, match=r"abgeschnitten ä\.png cannot be read as an image"):
        data[4]


def test_damaged_files_are_left_out_and_counted(tmp_path: Path, log: Log) -> None:
    root = write_damaged(tmp_path)
    data = ImageFolder("train", root, evaluation_fraction=0, on_damaged="skip")
    assert names(data) == ["000.png", "001.png", "000.png"]
    assert [data[index][1] for index in range(3)] == [0, 0, 1]
    ((level, line),) = {entry for entry in log() if "can't be read" in entry[1]}
    assert level == "INFO"
    assert line.startswith(f"2 of 5 images of {root} can't be read and are left out: {root}/a/bad.png: ")


def test_leaving_one_out_moves_no_other_to_the_other_split(tmp_path: Path) -> None:
    root = write_classes(tmp_path, a=40)
    before = [names(ImageFolder(split, root)) for split in ("train", "evaluation")]
    (root / "a" / "003.png").unlink()
    (root / "a" / "003.png").write_bytes(b"no picture")
    after = [names(ImageFolder(split, root, on_damaged="skip")) for split in ("train", "evaluation")]
    assert after == [[name for name in part if name != "003.png"] for part in before]


def test_16_bit_images_are_refused_rather_than_clipped(tmp_path: Path) -> None:
    write_image(tmp_path / "a" / "deep.png", 40000, "I;16")
    with pytest.raises(UserError, match=r"deep\.png: .* mode I;16; convert them to 8 bits"):
        ImageFolder("train", tmp_path)


@pytest.mark.parametrize(("mode", "colour"), [("CMYK", (0, 255, 255, 0)), ("RGB", (255, 0, 0))])
def test_jpegs_of_other_colours(tmp_path: Path, mode: str, colour: Any) -> None:
    write_image(tmp_path / "a" / "one.jpg", colour, mode, (32, 32))
    image, _ = ImageFolder("train", tmp_path, image_size=2, mean=(0, 0, 0), std=(1, 1, 1))[0]
    assert image.mean(dim=(1, 2)).tolist() == pytest.approx([1, 0, 0], abs=0.03)


# The index


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Notes the folders that are listed and the images that are looked at."""
    from distaccum.data.images import image_index

    noted: dict[str, list[str]] = {"listed": [], "looked": []}
    listed, reason = image_index._listed, image_index._reason

    def list_folder(real: str, before: Any) -> Any:
        noted["listed"].append(os.path.basename(real))
        return listed(real, before)

    def look_at(path: str) -> Any:
        noted["looked"].append(os.path.basename(path))
        return reason(path)

    monkeypatch.setattr(image_index, "_listed", list_folder)
    monkeypatch.setattr(image_index, "_reason", look_at)
    monkeypatch.setattr(image_index, "_GRAIN_NS", 0)
    return noted


def taken(noted: dict[str, list[str]]) -> dict[str, list[str]]:
    found = {name: sorted(values) for name, values in noted.items()}
    for values in noted.values():
        values.clear()
    return found


def test_a_later_start_lists_and_looks_at_what_has_changed(tmp_path: Path, scans: dict[str, list[str]]) -> None:
    root = write_classes(tmp_path, a=2, b=2)
    ImageFolder("train", root)
    assert taken(scans) == {"listed": ["a", "b"], "looked": ["000.png", "000.png", "001.png", "001.png"]}
    ImageFolder("evaluation", root)
    assert taken(scans) == {"listed": [], "looked": []}
    write_image(root / "b" / "new.png")
    (root / "b" / "000.png").unlink()
    data = ImageFolder("train", root, evaluation_fraction=0)
    assert taken(scans) == {"listed": ["b"], "looked": ["new.png"]}
    assert names(data) == ["000.png", "001.png", "001.png", "new.png"]


def test_what_was_damaged_is_looked_at_again(tmp_path: Path, scans: dict[str, list[str]]) -> None:
    root = write_damaged(tmp_path)
    assert len(ImageFolder("train", root, evaluation_fraction=0, on_damaged="skip")) == 3
    assert len(taken(scans)["looked"]) == 5
    write_image(root / "a" / "bad.png")  # in place: its folder's time stays the same
    assert len(ImageFolder("train", root, evaluation_fraction=0, on_damaged="skip")) == 4
    assert taken(scans) == {"listed": [], "looked": ["abgeschnitten ä.png", "bad.png"]}


def test_a_folder_that_has_just_changed_is_listed_again(
    tmp_path: Path, scans: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from distaccum.data.images import image_index

    monkeypatch.setattr(image_index, "_GRAIN_NS", 10**10)
    root = write_classes(tmp_path, a=2)
    for _ in range(2):
        ImageFolder("train", root)
        assert taken(scans)["listed"] == ["a"]


@pytest.mark.parametrize("kept", ["[]", "{", '{"x": 3}', '{"x": [1, 2, 3, 4]}', '{"x": [1, 2, [], [], {}, [], 7]}'])
def test_a_damaged_cache_is_made_again(tmp_path: Path, scans: dict[str, list[str]], kept: str) -> None:
    root = write_classes(tmp_path / "root", a=2)
    ImageFolder("train", root)
    (file,) = (Path(os.environ["XDG_CACHE_HOME"]) / "distaccum").glob("images-*.json")
    file.write_text(kept)
    taken(scans)
    assert len(ImageFolder("train", root)) == 1
    assert taken(scans)["listed"] == ["a"]


def test_pipes_are_no_images(tmp_path: Path) -> None:
    write_classes(tmp_path, a=2)
    os.mkfifo(tmp_path / "a" / "pipe.png")
    assert names(ImageFolder("train", tmp_path, evaluation_fraction=0)) == ["000.png", "001.png"]


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distaccum.data.images import image_index

    def refused(path: str) -> Any:
        raise PermissionError(13, "Permission denied", path)

    write_classes(tmp_path, a=2)
    monkeypatch.setattr(image_index.os, "scandir", refused)
    with pytest.raises(UserError, match=r"the folder .*/a can't be listed: Permission denied"):
        ImageFolder("train", tmp_path)


# Arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "test"}, "split='test'"),
        ({"evaluation_fraction": 1.0}, "evaluation_fraction=1.0"),
        ({"evaluation_fraction": -0.1}, "evaluation_fraction=-0.1"),
        ({"image_size": 0}, "image_size=0"),
        ({"fit": "pad"}, "fit=pad is none of stretch, crop"),
        ({"on_damaged": "ignore"}, "on_damaged=ignore is none of stop, skip, late"),
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
