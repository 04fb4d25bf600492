"""Frozen weights that a checkpoint leaves out; tests/distributed/checks_lora.py has them on several ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distaccum.checkpoints import Checkpointer, frozen, load_exported, load_model
from distaccum.checkpoints.folder import Checkpoint, DamagedCheckpointError, read_checkpoint, write_manifest
from distaccum.checkpoints.frozen import fingerprints
from distaccum.config import CheckpointConfig
from distaccum.config.enums import Weights
from distaccum.errors import UserError
from distaccum.tools.evaluate.members import Member, load_weights


class Net(nn.Module):
    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.base, self.norm, self.head = nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)
        self.base.requires_grad_(False)
        self.to(dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.norm(self.base(inputs)))
        return outputs


def checkpointer_of(folder: Path, model: Net, trainable_only: bool | None = True) -> Checkpointer:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    return Checkpointer(folder, model, optimizer, config=CheckpointConfig(trainable_only=trainable_only))


def train(checkpointer: Checkpointer, steps: int = 1) -> None:
    for _ in range(steps):
        checkpointer.strategy.model(torch.randn(5, 4)).square().mean().backward()
        checkpointer.optimizer.step()
        checkpointer.optimizer.zero_grad()


def saved(folder: Path, model: Net, update: int = 1, trainable_only: bool | None = True) -> Checkpoint:
    checkpointer = checkpointer_of(folder, model, trainable_only)
    checkpointer.tensors = {"ema": {"head.bias": torch.ones(2)}}
    train(checkpointer)
    checkpointer.save(update, {}, wait=True)
    newest = checkpointer.newest()
    assert newest is not None
    return newest


def held(checkpoint: Checkpoint) -> set[str]:
    return {name.removeprefix("model/") for name in checkpoint.manifest["tensors"] if name.startswith("model/")}


def of_one(tensor: Tensor) -> str:
    return str(fingerprints({"x": tensor}, None)["x"]["fingerprint"])


def by_hand(tensor: Tensor) -> str:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.contiguous().view(integers).flatten().tolist()
    return f"{sum(b * (i * 0x9E3779B97F4A7C16 + 1) for i, b in enumerate(bits)) % 2**64:016x}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_the_fingerprint_is_its_formula(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in ((), (0,), (7,), (5, 3), (3, 1, 4), (2, 3, 2, 2)):
        tensor = (torch.randn(shape) * 50).to(dtype)
        whole = of_one(tensor)
        assert whole == by_hand(tensor)
        monkeypatch.setattr(frozen, "_MOST_NUMBERS", 4)
        assert of_one(tensor) == whole
        monkeypatch.undo()
    numbers = torch.tensor([[0, 1, 0], [0, 0, 1]]).to(dtype)
    assert of_one(numbers.T) == by_hand(numbers.T) != of_one(numbers)
    assert of_one(numbers.flip(1)) != of_one(numbers)


def test_frozen_weights_are_left_out(tmp_path: Path) -> None:
    model = Net()
    checkpoint = saved(tmp_path / "own", model)
    assert set(checkpoint.frozen) == {"base.weight", "base.bias"}
    assert held(checkpoint) == model.state_dict().keys() - checkpoint.frozen.keys()
    assert held(saved(tmp_path / "all", Net(), trainable_only=None)) == model.state_dict().keys()
    other = Net()
    checkpointer_of(tmp_path, other, None).restore(checkpoint)
    plain = Net()
    load_model(checkpoint, plain)
    averaged = Net()
    load_model(checkpoint, averaged, "ema")
    assert torch.equal(averaged.head.bias, torch.ones(2))
    averaged.head.bias.data.copy_(model.head.bias)
    for found in (other, plain, averaged):
        assert all(torch.equal(value, found.state_dict()[name]) for name, value in model.state_dict().items())


def test_an_evaluation_begins_with_the_weights_of_init_from(tmp_path: Path) -> None:
    begin, model = Net(seed=3), Net(seed=4)
    save_file(begin.state_dict(), tmp_path / "begin.safetensors")
    load_exported(model, str(tmp_path / "begin.safetensors"), "model.init_from")
    checkpoint = saved(tmp_path, model)
    found = Net()
    section = {"_target_": f"{__name__}.Net", "init_from": str(tmp_path / "begin.safetensors")}
    load_weights(found, Member(checkpoint=checkpoint, config={"model": section}), Weights.raw)
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in model.state_dict().items())


def test_other_frozen_weights_are_refused(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, Net())
    changed = Net()
    changed.base.bias.data[1].add_(1e-6)
    message = r"leaves out 2 frozen weights.*: base\.bias \(fingerprint: float32 \w{16} there, float32 \w{16} here\)"
    for load in (checkpointer_of(tmp_path, changed).restore, lambda it: load_model(it, changed)):
        with pytest.raises(UserError, match=message):
            load(checkpoint)
    with pytest.raises(UserError, match=r"base\.bias, base\.weight|base\.weight, base\.bias"):
        load_model(checkpoint, Net(seed=1))
    with pytest.raises(UserError, match=r"float32 \w{16} there, float32 \w{16}, cast from torch.bfloat16 here"):
        load_model(checkpoint, Net(dtype=torch.bfloat16))
    load_model(checkpoint, Net(dtype=torch.float64))  # which holds the same numbers


def test_what_has_changed_since_the_start_is_saved(tmp_path: Path) -> None:
    """However it was changed; and what is unfrozen on the way belongs to the optimizer from the start."""
    model = Net()
    checkpointer = checkpointer_of(tmp_path, model)
    model.base.bias.data += 1  # counted by no version
    checkpointer.save(1, {}, wait=True)
    first = read_checkpoint(tmp_path / "update-00000001")
    assert set(first.frozen) == {"base.weight"}
    other = Net()
    going_on = checkpointer_of(tmp_path, other)
    going_on.restore(first)
    assert torch.equal(other.base.bias, model.base.bias)
    going_on.save(2, {}, wait=True)
    assert set(read_checkpoint(tmp_path / "update-00000002").frozen) == {"base.weight"}
    model.base.weight.requires_grad_(True)
    later = checkpointer_of(tmp_path, model)
    model.base.weight.requires_grad_(False)
    later.save(3, {}, wait=True)
    assert set(read_checkpoint(tmp_path / "update-00000003").frozen) == {"base.bias"}


def test_a_run_that_has_saved_all_goes_on_without(tmp_path: Path) -> None:
    """A checkpoint as they were before there was such an entry."""
    checkpoint = saved(tmp_path / "all", Net(), trainable_only=False)
    del checkpoint.state["frozen"]
    (checkpoint.path / "manifest.json").unlink()
    write_manifest(checkpoint.path, checkpoint.manifest)
    before = read_checkpoint(checkpoint.path)
    model = Net()
    checkpointer = checkpointer_of(tmp_path / "on", model)
    checkpointer.restore(before)
    checkpointer.save(2, {}, wait=True)
    assert set(read_checkpoint(tmp_path / "on" / "update-00000002").frozen) == {"base.weight", "base.bias"}
    other = Net(seed=1)  # of which the checkpoint has all weights, so that these are not those of its start
    checkpointer = checkpointer_of(tmp_path / "other", other)
    checkpointer.restore(before)
    checkpointer.save(2, {}, wait=True)
    assert read_checkpoint(tmp_path / "other" / "update-00000002").frozen == {}


@pytest.mark.parametrize("entry", [[], {"base.bias": 3}, {"base.bias": {"dtype": "float32", "shape": [3]}}])
def test_a_wrong_entry_is_damage(tmp_path: Path, entry: object) -> None:
    checkpoint = saved(tmp_path, Net())
    checkpoint.state["frozen"] = json.loads(json.dumps(entry))
    (checkpoint.path / "manifest.json").unlink()
    write_manifest(checkpoint.path, checkpoint.manifest)
    with pytest.raises(DamagedCheckpointError, match=r"state\.frozen"):
        read_checkpoint(checkpoint.path)
