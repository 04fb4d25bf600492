from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import TINY, Ended, updates
from documents import block_run_by
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distaccum import UserError
from distaccum.checkpoints import MODEL_FILE, export, export_model, load_exported
from distaccum.strategies import SingleStrategy

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


def _in_two_files(folder: Path, **index: Any) -> None:
    tensors = _whole(Net())
    names = sorted(tensors)
    places = {name: f"model-0000{1 + (name > names[3])}-of-00002.safetensors" for name in names}
    for file in set(places.values()):
        save_file({name: tensors[name].clone() for name in names if places[name] == file}, folder / file)
    content = {"metadata": {"total_size": 1}, "weight_map": places} | index
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def _into_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def test_several_files_come_over_by_their_index(tmp_path: Path) -> None:
    _in_two_files(tmp_path)
    wanted = {k: v for path in tmp_path.glob("*.safetensors") for k, v in load_file(path).items()}
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        model = Net()
        load_exported(model, str(path), "model.init_from")
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in wanted.items())
    # A single file in the same folder is newer: an export of several removes it first.
    save_file(_whole(whole := Net()), tmp_path / MODEL_FILE)
    load_exported(model, str(tmp_path), "model.init_from")
    assert torch.equal(model.first.weight, whole.first.weight)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda at: (at / "model-00002-of-00002.safetensors").unlink(), "names the file model-00002-of-00002.safeten"),
        (lambda at: (at / "model-00001-of-00002.safetensors").write_bytes(b"no"), "model-00001-of-00002.safetensors: "),
        (lambda at: save_file({}, at / "model-00001-of-00002.safetensors"), "says that first.bias is in model-00001-"),
        (lambda at: _in_two_files(at, weight_map={"first.bias": "../other.safetensors"}), "names '../other.safeten"),
        (lambda at: _in_two_files(at, weight_map={"first.bias": "/etc/passwd"}), "names '/etc/passwd', which is not a"),
        (lambda at: _in_two_files(at, weight_map={"first.bias": ".."}), "names '..', which is not a file beside it"),
        (lambda at: _in_two_files(at, weight_map={"first.bias": 3}), "has no weight_map with the name of a file for e"),
        (lambda at: _in_two_files(at, weight_map=None), "has no weight_map with the name of a file for each tensor"),
        (lambda at: (at / "model.safetensors.index.json").write_text("[" * 100_000), "recursion"),
        (lambda at: (at / "model.safetensors.index.json").write_text("{"), "Expecting property name"),
        (
            lambda at: _into_a_pipe(at / "model-00001-of-00002.safetensors"),
            "00001-of-00002.safetensors is no regular",
        ),
    ],
)
def test_several_files_that_make_no_whole_are_refused(
    spoil: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    _in_two_files(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=r"^model.init_from=.* can't be read: .*" + re.escape(message)) as caught:
        load_exported(Net(), str(tmp_path), "model.init_from")
    assert "\n" not in str(caught.value)


def test_a_tensor_of_several_files_of_another_shape_is_refused(tmp_path: Path) -> None:
    _in_two_files(tmp_path)
    with pytest.raises(UserError, match=r"holds another model: first.bias is \[3\] there and \[4\] here; first.weight"):
        load_exported(Net(4), str(tmp_path), "model.init_from")


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("before", [1, 3, 4])
@pytest.mark.parametrize("after", [1, 3])
def test_a_kill_in_an_export_leaves_a_whole_model_or_none(
    before: int, after: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever operation on files is the last one, for exports that replace files of another number."""
    old, new = Net(), Net()
    size = sum(value.nbytes for value in _whole(old).values())

    def exported(model: nn.Module, number: int, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        export_model(SingleStrategy(model), folder, is_main=True, most_bytes={1: size, 3: 36, 4: 30}[number])

    def count(left: list[int], original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise _Killed
            return original(*args, **kwargs)

        return counted

    outcomes = set()
    for last in itertools.count():
        exported(old, before, folder := tmp_path / str(last))
        with monkeypatch.context() as patch, suppress(_Killed):
            left = [last]
            for name in ("rename", "unlink"):
                patch.setattr(Path, name, count(left, getattr(Path, name)))
            patch.setattr(export, "write_safetensors", count(left, export.write_safetensors))
            exported(new, after, folder)
        found = Net()
        if list(folder.glob("model.safetensors*")):
            load_exported(found, str(folder), "model.init_from")
            alike = [all(torch.equal(v, found.state_dict()[k]) for k, v in _whole(m).items()) for m in (old, new)]
            assert alike.count(True) == 1
            outcomes.add("old" if alike[0] else "new")
        else:
            outcomes.add("none")
        if left[0] >= 0:
            break
        # The next export mends it, and leaves nothing behind.
        exported(new, after, folder)
        load_exported(found, str(folder), "model.init_from")
        exported(new, after, tmp_path / "fresh")
        assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "fresh").iterdir()}
    assert outcomes == {"old", "new"} | (set() if after == 1 else {"none"})


def test_the_documented_way_to_load_it(train: Callable[..., Ended]) -> None:
    assert train(*TINY, "run_dir=run").status == 0
    found: dict[str, nn.Module] = {}
    exec(block_run_by("checkpoints/test_export.py"), found)
    stored = load_file("run/model.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in found["model"].state_dict().items())
