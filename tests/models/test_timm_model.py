from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from distaccum.config.vision import TimmConfig
from distaccum.errors import UserError
from distaccum.models import timm_model
from distaccum.training.model import build_model, remarks


@dataclass
class Data:
    num_classes: int = 3
    input_shape: tuple[int, ...] = (3, 32, 32)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("test_resnet", (3, 32, 32)),
        ("test_vit", (1, 48, 32)),  # made for one size
        ("test_resnet.r160_in1k", (3, 32, 32)),
    ],
)
def test_classes_channels_and_size_are_the_datas(name: str, shape: tuple[int, ...]) -> None:
    model = build_model(TimmConfig(name=name), Data(5, shape))
    assert model(torch.zeros(2, *shape)).shape == (2, 5)


def test_what_is_given_comes_first() -> None:
    model = build_model(
        TimmConfig(name="test_vit", num_classes=7, arguments={"img_size": 16, "depth": 1, "embed_dim": 64}), Data()
    )
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 7)
    assert len(model.blocks) == 1


def test_batch_norm_is_remarked_on() -> None:
    (remark,) = remarks(build_model(TimmConfig(name="test_resnet"), Data()), is_cut=True)
    assert "BatchNorm computes with the statistics of each micro-batch" in remark
    assert not list(remarks(build_model(TimmConfig(name="test_vit"), Data()), is_cut=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "test_resnet", "num_classes": None}, "num_classes is null, and the data doesn't say it"),
        ({"name": "resnet81"}, "timm has no model of that name. Near it: resnet18"),
        ({"name": "qqqqqqqq"}, r"timm.list_models\(\) lists them"),
        ({"name": "test_resnet.nobody"}, r"no such weights. There are: test_resnet.r160_in1k"),
        ({"name": "test_resnet", "arguments": {"colour": 1}}, "can't make it with .*colour"),
        (
            {"name": "test_vit", "input_shape": (3, 2, 2), "drop_path_rate": 0.1, "pretrained_file": "/none"},
            "/none is not",
        ),
    ],
)
def test_what_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        timm_model(**{"num_classes": 3, "input_shape": (3, 32, 32), **arguments})


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"model=timm needs timm.*pip install 'distaccum\[vision\]'"):
        timm_model("test_resnet", num_classes=3)


# Weights of a file


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    save_file(timm_model("test_vit", num_classes=4).state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_weights_of_a_file_but_for_the_classifier(weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        model = timm_model("test_vit", pretrained_file=str(weights), num_classes=3, mean=(0.5, 0.5, 0.5), std=[0.1] * 3)
    known, found = load_file(weights), model.state_dict()
    assert all(torch.equal(found[name], known[name]) for name in known if not name.startswith("head."))
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("distaccum")]
    assert messages == [
        "test_vit begins with weights, but for head.weight, head.bias, at random",
        "test_vit: its weights were trained with data.std=[0.5,0.5,0.5], and the data have [0.1, 0.1, 0.1]",
    ]


def test_weights_without_something_are_refused(weights: Path) -> None:
    kept = {name: value for name, value in load_file(weights).items() if not name.startswith("blocks.2.norm1")}
    save_file(kept, weights)
    with pytest.raises(UserError, match=r"hold nothing for blocks.2.norm1.weight, blocks.2.norm1.bias"):
        timm_model("test_vit", pretrained_file=str(weights), num_classes=3)


def test_weights_of_another_model_are_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(can't be loaded from|hold nothing for)"):
        timm_model("test_resnet", pretrained_file=str(weights), num_classes=3)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"its weights can't be loaded from .*broken"):
        timm_model("test_resnet", pretrained_file=str(broken), num_classes=3)
    torch.save({"weight": Data()}, tmp_path / "code.pth")
    with pytest.raises(UserError, match=r"its weights can't be loaded from .*code"):
        timm_model("test_resnet", pretrained_file=str(tmp_path / "code.pth"), num_classes=3)
