from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import TINY, Ended, updates
from documents import block_run_by
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distaccum import UserError
from distaccum.checkpoints import MODEL_FILE, load_exported

RUN = [
    "data=synthetic",
    "data.input_shape=[4]",
    "data.num_samples=64",
    "data.evaluation=null",
    "model=mlp",
    "model.hidden_sizes=[8]",
    "batch.global_batch_size=64",
    "wandb.mode=disabled",
    "optim=sgd",
]
"""One update an epoch, of all the data: what an update does depends on the weights alone."""


class Net(nn.Module):
    """With tied weights and a buffer."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(width)


def _whole(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict().items() if name != "second.weight"}


def test_a_run_begins_from_the_weights_of_another(train: Callable[..., Ended], tmp_path: Path) -> None:
    assert train(*RUN, "run_dir=whole", "train.max_updates=4", "schedule=constant").status == 0
    assert train(*RUN, "run_dir=first", "train.max_updates=2", "schedule=constant").status == 0
    with safe_open(Path("first", MODEL_FILE), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    words = ["train.max_updates=2", "schedule=constant", "seed=5"]
    assert train(*RUN, *words, "run_dir=second", "model.init_from=first").status == 0
    losses = [line["loss"] for line in updates(Path("second"))]
    assert losses == pytest.approx([line["loss"] for line in updates(Path("whole"))][2:], rel=1e-5)
    assert "model.init_from: the weights come from first\n" in Path("second", "logs", "rank0.log").read_text()
    # Without it, another seed begins elsewhere.
    assert train(*RUN, *words, "run_dir=other").status == 0
    assert updates(Path("other"))[0]["loss"] != pytest.approx(losses[0], rel=1e-3)


def test_a_model_of_one_s_own_has_the_key_too(train: Callable[..., Ended], tmp_path: Path) -> None:
    save_file({"0.weight": torch.zeros(4, 4)}, "other.safetensors")
    linear = "{_target_: torch.nn.Linear, in_features: 4, out_features: 4}"
    own = ["model=custom", "model._target_=torch.nn.Sequential", f"+model._args_=[{linear}]"]
    ended = train(*RUN[:4], *own, "batch.global_batch_size=64", "model.init_from=other.safetensors")
    assert ended.message == (
        "model.init_from=other.safetensors holds another model: 0.bias is missing from it. Configure the model that it "
        "was made of, or take over what fits of it in a model._target_ of your own."
    )


def test_weights_and_buffers_come_over_bit_for_bit(tmp_path: Path) -> None:
    model, other = Net(), Net()
    model.norm.running_mean.fill_(2.5)
    save_file(_whole(model), tmp_path / "own.safetensors")
    load_exported(other, str(tmp_path / "own.safetensors"), "model.init_from")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    assert other.second.weight is other.first.weight
    wider = Net().double()
    load_exported(wider, str(tmp_path / "own.safetensors"), "model.init_from")
    assert torch.equal(wider.first.weight, model.first.weight.double())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first.bias": None}, " holds another model: first.bias is missing from it"),
        ({"third": torch.zeros(1)}, " holds another model: third is unknown to the model"),
        ({"first.bias": torch.zeros(4)}, " holds another model: first.bias is [4] there and [3] here"),
        ({"first.bias": torch.zeros(3).double()}, ": first.bias is torch.float64, which would be rounded to torch.flo"),
    ],
)
def test_other_names_shapes_and_wider_formats_are_refused(
    change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    tensors = _whole(Net()) | change
    save_file({name: value for name, value in tensors.items() if value is not None}, tmp_path / "own.safetensors")
    with pytest.raises(UserError, match=r"^model.init_from=.*own.safetensors" + re.escape(message)):
        load_exported(Net(), str(tmp_path / "own.safetensors"), "model.init_from")


@pytest.mark.parametrize("content", [None, b"", b"\x80\x04pickle", "folder"])
def test_what_is_no_safetensors_file_is_refused(content: bytes | str | None, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"weights.pt can't be read: .* Name a safetensors file, or the folder of a"):
        load_exported(Net(), str(path), "model.init_from")


def test_the_documented_way_to_load_it(train: Callable[..., Ended]) -> None:
    assert train(*TINY, "run_dir=run").status == 0
    found: dict[str, nn.Module] = {}
    exec(block_run_by("checkpoints/test_export.py"), found)
    stored = load_file("run/model.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in found["model"].state_dict().items())
