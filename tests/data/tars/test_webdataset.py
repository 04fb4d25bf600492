from __future__ import annotations

import io
import json
import logging
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import fsspec
import numpy as np
import pytest
import torch
from command_line import Ended, updates
from object_server import serving
from tar_files import image_bytes, tar_bytes, write_images, write_tar

from distaccum.data import Augment, Mixing, WebDataset
from distaccum.data.tars import tar_index
from distaccum.errors import UserError

PLAIN: dict[str, Any] = {"image_size": 4, "mean": (0, 0, 0), "std": (1, 1, 1)}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def numbers(data: WebDataset) -> list[tuple[int, int]]:
    """Which image each sample is, and its label."""
    return [(round(float(image[0, 0, 0]) * 255), label) for image, label in (data[index] for index in range(len(data)))]


def test_samples(tmp_path: Path) -> None:
    write_images(tmp_path, (5, 0, 1, 7))
    data = WebDataset(f"{tmp_path}/shard-{{000..003}}.tar", evaluation_fraction=0, **PLAIN)
    assert numbers(data) == [(number, number % 3) for number in range(13)]
    assert (data.num_classes, data.input_shape) == (3, (3, 4, 4))
    assert data[0][0].dtype == torch.float32
    assert numbers(pickle.loads(pickle.dumps(data))) == numbers(data)
    with pytest.raises(IndexError):
        data[13]
    assert not hasattr(data, "lengths")


def test_a_part_is_held_out(tmp_path: Path) -> None:
    write_images(tmp_path, (30, 10))
    train, evaluation = (
        numbers(WebDataset(f"{tmp_path}/*.tar", split, evaluation_fraction=0.1, **PLAIN))
        for split in ("train", "evaluation")
    )
    assert len(evaluation) == 4
    assert sorted(train + evaluation) == [(number, number % 3) for number in range(40)]
    assert max(np.diff([number for number, _ in evaluation])) == 10


def test_tar_files_of_their_own_for_the_evaluation(tmp_path: Path) -> None:
    shards = write_images(tmp_path / "train", (7,), num_classes=2)
    other = write_images(tmp_path / "val", (8,), num_classes=4)
    train, evaluation = (
        WebDataset(shards, split, evaluation_shards=other, **PLAIN) for split in ("train", "evaluation")
    )
    assert (len(train), len(evaluation)) == (7, 8)
    assert train.num_classes == evaluation.num_classes == 4
    with pytest.raises(UserError, match=r"data\.evaluation_shards: .*shard-000\.tar is named twice, also in data\.sha"):
        WebDataset(shards, evaluation_shards=f"{tmp_path}/**/*.tar")
    with pytest.raises(UserError, match=r"data\.shards=None is neither a path nor"):
        WebDataset(cast(Any, None))


def test_members_are_decoded_by_their_extensions(tmp_path: Path) -> None:
    array, saved = io.BytesIO(), io.BytesIO()
    np.save(array, np.arange(6, dtype=np.float64).reshape(2, 3))
    torch.save({"a": torch.ones(2)}, saved)
    members = {
        "x/1.PNG": image_bytes((255, 0, 51)),
        "x/1.seg.png": image_bytes((0, 255, 0)),
        "x/1.cls": b" 3\n",
        "x/1.txt": "ä".encode(),
        "x/1.json": json.dumps({"b": [1]}).encode(),
        "x/1.npy": array.getvalue(),
        "x/1.pt": saved.getvalue(),
        "x/.hidden": b"",
    }
    shard = write_tar(tmp_path / "a.tar", members)
    names = {"image": "jpg;png", "mask": "seg.png", "label": "cls", "text": "txt", "more": "json", "array": "npy"}
    data = WebDataset(shard, evaluation_fraction=0, fields={**names, "saved": "pt"}, **PLAIN)
    (sample,) = (data[index] for index in range(len(data)))
    assert [round(value, 4) for value in sample["image"].mean(dim=(1, 2)).tolist()] == [1, 0, 0.2]
    assert sample["mask"].mean(dim=(1, 2)).tolist() == [0, 1, 0]
    assert (sample["label"], sample["text"], sample["more"]) == (3, "ä", {"b": [1]})
    assert sample["array"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert sample["saved"]["a"].tolist() == [1, 1]
    assert data.num_classes == 4
    only = WebDataset(shard, evaluation_fraction=0, fields={"label": "cls"})
    assert only[0] == {"label": 3}
    doubled = WebDataset(shard, evaluation_fraction=0, fields={"x": "npy"}, transform=lambda sample: sample["x"] * 2)
    assert doubled[0].tolist() == [[0, 2, 4], [6, 8, 10]]


class _Code:
    def __reduce__(self) -> Any:
        return os.mkdir, ("made-by-unpickling",)


def test_what_can_not_be_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved, objects = io.BytesIO(), io.BytesIO()
    torch.save(_Code(), saved)
    np.save(objects, np.array([_Code()]), allow_pickle=True)
    name = "n" * 90
    members = {
        f"{name}.png": image_bytes((1, 2, 3))[:45],
        f"{name}.pt": saved.getvalue(),
        f"{name}.npy": objects.getvalue(),
        f"{name}.json": b"{",
        f"{name}.txt": b"\xff",
        f"{name}.flac": b"sound",
    }
    shard = write_tar(tmp_path / "a.tar", members)
    bad = write_tar(tmp_path / "b.tar", {"ä.png": b"no image"})
    with pytest.raises(UserError, match=r"sample 0, .* in .*b\.tar: it .* an image: cannot identify image file$"):
        WebDataset(bad, evaluation_fraction=0, fields={"x": "png"})[0]
    for kind in ("png", "pt", "npy", "json", "txt"):
        data = WebDataset(shard, evaluation_fraction=0, fields={"x": kind})
        said = "it cannot be read as an image" if kind == "png" else f"can't be decoded as {kind}"
        with pytest.raises(UserError, match=rf"^sample 0, {name}\.{kind} in .*a\.tar:? {said}"):
            data[0]
    assert not Path("made-by-unpickling").exists()
    with pytest.raises(
        UserError, match=r"members flac can't be decoded: decoded are images, cls, txt, .*data.transform"
    ):
        WebDataset(shard, evaluation_fraction=0, fields={"x": "flac"})
    data = WebDataset(shard, evaluation_fraction=0, fields={"x": "flac"}, transform=lambda sample: sample["x"])
    assert data[0] == b"sound"


@pytest.mark.parametrize(
    ("members", "arguments", "message"),
    [
        (
            [("1.png", b""), ("1.cls", b"1"), ("2.png", b""), ("3.cls", b"1")],
            {},
            r"data\.image=.*: 1 of 3 samples have no member of these extensions; the first is number 2, in .*a\.tar, "
            r"with cls\. Each sample must have one",
        ),
        ([("1.png", b""), ("1.jpg", b""), ("1.cls", b"1")], {}, r"data\.image=.*: 1 of 1 samples have several members"),
        ([("1.png", b"")], {"fields": {"a": "json"}}, r"data\.fields\.a=json: 1 of 1 samples have no member"),
        (
            [("1.png", b""), ("2.png", b""), ("1.cls", b"")],
            {},
            r"members of the sample 1 are in several places, as 1\.c",
        ),
        ([("1.png", b""), ("1.png", b"")], {}, r"1\.png is there twice"),
        ([("README", b"")], {}, r"README belongs to no sample, as it has no extension"),
        ([(".a", b"")], {}, r"there are no samples in .*a\.tar"),
        ([("1.png", b""), ("1.cls", b"cat")], {}, r"1\.cls in .*a\.tar holds no class, an integer from 0 on"),
        ([("1.png", b""), ("1.cls", b"-1")], {}, r"1\.cls in .*a\.tar holds no class"),
        ([("1.png", b""), ("1.cls", b"7")], {"num_classes": 7}, r"data\.num_classes=7, and there is the label 7"),
        ([("1.png", b""), ("1.txt", b"7")], {"label": "txt"}, r"data\.num_classes must be given"),
        (
            [(f"1.{number}.png", b"") for number in range(61)],
            {},
            r"61 different extensions, as .*: take other dots out",
        ),
        ([("1.png", b""), ("1.cls", b"1")], {"image_size": 0}, r"image_size=0 is impossible"),
        ([("1.png", b""), ("1.cls", b"1")], {"evaluation_fraction": 1.0}, r"evaluation_fraction=1\.0 must lie in"),
        ([("1.png", b"")], {"fields": ["png", "cls"]}, r"data\.fields=\['png', 'cls'\] must give the extensions"),
        ([("1.png", b"")], {"fields": {"a": 3}}, r"data\.fields={'a': 3} must give"),
        ([("1.png", b"")], {"fields": {"a": "png"}, "mixing": Mixing(mixup=1.0)}, r"data\.fields can't be mixed"),
        ([("1.png", b""), ("1.cls", b"1")], {"transform": 3}, r"data\.transform=3 can't be called"),
    ],
)
def test_what_is_refused_before_training(
    tmp_path: Path, members: list[tuple[str, bytes]], arguments: dict[str, Any], message: str
) -> None:
    shard = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=message):
        WebDataset(shard, **{"evaluation_fraction": 0, **arguments})


def test_labels_of_other_members(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", {"1.png": image_bytes((1, 0, 0)), "1.txt": b"7"})
    assert WebDataset(shard, evaluation_fraction=0, label="txt", num_classes=8)[0][1] == 7
    with pytest.raises(UserError, match=r"sample 0, in .*a\.tar has the label '7', and there are 7 classes"):
        WebDataset(shard, evaluation_fraction=0, label="txt", num_classes=7)[0]


class Coarse:
    """A transform that makes other classes and images."""

    num_classes, input_shape = 2, (12,)

    def __call__(self, sample: tuple[torch.Tensor, int]) -> tuple[torch.Tensor, int]:
        return sample[0].flatten()[:12], {0: 0, 1: 1, 2: 1}[sample[1]]

    def collate_fn(self, samples: list[Any]) -> int:
        return len(samples)


def test_attributes_of_a_transform_come_first_and_its_failure_names_the_sample(tmp_path: Path) -> None:
    shards = write_images(tmp_path, (3, 2), num_classes=4)
    data = WebDataset(shards, evaluation_fraction=0, transform=Coarse(), **PLAIN)
    assert (data.num_classes, data.input_shape, data.collate_fn([1, 2])) == (2, (12,), 2)
    assert data[2][1] == 1
    with pytest.raises(UserError, match=r"^sample 3, in .*001\.tar, in data\.transform: KeyError: 3"):
        data[3]


def test_all_files_that_are_no_good_are_named(tmp_path: Path) -> None:
    shards = write_images(tmp_path, (2, 2, 2))
    for shard in shards[1:]:
        Path(shard).write_bytes(Path(shard).read_bytes()[:-9000])
    with pytest.raises(UserError, match=r"2 of 3 tar files can't be used: .*001\.tar is cut off.*002\.tar is cut off"):
        WebDataset(shards)
    assert not list((tmp_path / ".distaccum").glob("*.tar-index"))


def test_an_index_is_made_once_and_anew_for_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    shards = write_images(tmp_path, (4, 4))
    WebDataset(shards)
    assert "8 samples of cls, png in 2 files" in caplog.text
    with monkeypatch.context() as nothing_is_read:
        nothing_is_read.setattr(tar_index, "_scan", None)
        assert len(WebDataset(shards, evaluation_fraction=0)) == 8
    write_images(tmp_path, (4, 5))
    assert len(WebDataset(shards, evaluation_fraction=0)) == 9
    assert len(list((tmp_path / ".distaccum").glob("*.tar-index"))) == 1


def test_augmented_and_mixed(tmp_path: Path) -> None:
    shards = write_images(tmp_path, (8,))
    data = WebDataset(shards, evaluation_fraction=0, augment=Augment([0.5, 1.0], colour=0.5), **PLAIN)
    random.seed(0)
    one = data[3][0]
    assert not torch.equal(one, data[3][0])
    random.seed(0)
    assert torch.equal(one, data[3][0])
    mixed = WebDataset(shards, evaluation_fraction=0, mixing=Mixing(mixup=1.0), **PLAIN)
    image, target = mixed[3]
    assert (image.shape, target.shape) == ((3, 4, 4), (3,))
    assert float(target.sum()) == pytest.approx(1)


def test_tar_files_in_object_stores(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Little more is read than the members that are asked for: an index of headers, then a request a sample."""
    caplog.set_level(logging.INFO)
    members: dict[str, bytes] = {}
    for number in range(3):
        members |= {f"{number}.png": image_bytes((number, 0, 0)), f"{number}.cls": b"%d" % number}
        members[f"{number}.bin"] = os.urandom(1 << 20)
    write_tar(tmp_path / "a.tar", members)
    with serving(tmp_path) as server:
        data = WebDataset(f"{server.url}/a.tar", evaluation_fraction=0, **PLAIN)
        spans = [span[6:].split("-") for *_, span in server.requests if span]
        sent = sum(int(last) - int(first) + 1 for first, last in spans)
        assert sent < 1 << 20
        before = len(server.requests)
        server.faults += [503]
        assert numbers(data) == [(0, 0), (1, 1), (2, 2)]
        assert len(server.requests) == before + 4
        signed = WebDataset(f"{server.url}/a.tar?X-Amz-Signature=0123456789", evaluation_fraction=0, **PLAIN)
        assert numbers(signed) == numbers(data)
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len([path for path in kept if path.suffix == ".tar-index"]) == 2
    assert not [path for path in kept if "0123456789" in path.name or b"0123456789" in path.read_bytes()]
    assert "0123456789" not in caplog.text
    fsspec.filesystem("memory").pipe_file("/tars/b.tar", tar_bytes(members))
    assert numbers(WebDataset("memory://tars/*.tar", evaluation_fraction=0, **PLAIN)) == [(0, 0), (1, 1), (2, 2)]


class Brighter:
    """A transform that a configuration names."""

    def __call__(self, sample: tuple[torch.Tensor, int]) -> tuple[torch.Tensor, int]:
        return sample[0] + 1, sample[1]


def test_a_run(train: Callable[..., Ended], tmp_path: Path) -> None:
    write_images(tmp_path / "tars ä", (17, 3, 10))
    settings = [
        "data=webdataset",
        'data.shards="tars ä/shard-{000..002}.tar"',
        "data.evaluation_fraction=0.2",
        "data.image_size=8",
        *("data.crop=[0.5,1]", "data.mixup=0.2", "data.mix_probability=0.5"),
        "schedule=constant",
        "model=cnn",
        "model.channels=[8]",
        "batch.global_batch_size=6",
        "train.epochs=2",
        "wandb.mode=disabled",
    ]
    whole = train(*settings, "run_dir=whole")
    assert (whole.status, whole.err) == (0, "")
    assert "made the tar-index of tars ä/shard-000.tar" in whole.out
    losses = [line["loss"] for line in updates(Path("whole"))]
    assert len(losses) == 8
    assert train(*settings, "train.max_updates=3", "data.evaluation=null", "run_dir=parts").status == 0
    again = train(*settings, "batch.micro_batch_size=2", "data.num_workers=1", "run_dir=parts")
    assert again.status == 0, again
    assert [line["loss"] for line in updates(Path("parts"))] == pytest.approx(losses, rel=1e-5)
    named = train(*settings, "+data.transform._target_=test_webdataset.Brighter", "run_dir=named")
    assert (named.status, named.err) == (0, "")
    assert updates(Path("named"))[0]["loss"] != losses[0]
    wrong = train(*settings, "data.image=bmp", "run_dir=wrong")
    assert wrong.status == 2
    assert "data.image=bmp: 30 of 30 samples have no member of these extensions; the first is number 0" in wrong.err
