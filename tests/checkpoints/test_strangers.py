"""Checkpoints that somebody else has made, with the right hashes: one message refuses them."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distaccum.checkpoints import Checkpointer, checked
from distaccum.checkpoints.folder import MANIFEST, DamagedCheckpointError, read_checkpoint, write_manifest
from distaccum.errors import UserError

RANK = "rank-00000.safetensors"


class Stepping:
    """An object of a run with state of its own."""

    def __init__(self) -> None:
        self.steps = [1, (2, 3)]

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "by_number": {1: 0.5}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = [int(state["steps"][0]), tuple(map(int, state["steps"][1]))]


def new(folder: Path) -> tuple[Checkpointer, nn.Module]:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()
    return Checkpointer(folder, model, optimizer, states={"stepping": Stepping()}), model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    checkpointer, _ = new(tmp_path)
    checkpointer.save(7, {"epoch": 1}, wait=True)
    return tmp_path / "update-00000007"


def rewritten(checkpoint: Path, content: dict[str, Any]) -> Path:
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint, content)
    return checkpoint


def content_of(checkpoint: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text())["content"]
    return content


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(entry, (*path, key))


def changed(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    found = copy.copy(content)
    found[path[0]] = changed(content[path[0]], path[1:], value)
    return found


WRONG = [None, True, -1, 1.5, "text", [], {}, [{}], {"a": []}, 1 << 70, float("nan"), {"__tensor__": [1]}]


def test_a_wrong_value_anywhere_is_one_message(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it is taken, where any value will do."""
    content = content_of(saved)
    some = [path for path in places(content) if path and path[0] != "tensors"]
    tensor = "optimizer/0.weight/exp_avg"
    some += [("tensors",), *(("tensors", tensor, *path) for path in places(content["tensors"][tensor]))]
    restoring, _ = new(saved.parent)
    refused = 0
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for number, path in enumerate(some):
        for value in WRONG[number % 3 :: 3]:  # each kind at every third place
            rewritten(saved, changed(content, path, value))
            found, problem = checked(saved, rank=0, gather=lambda entry: [entry])
            try:
                if found is None:
                    refused += 1
                    assert problem
                else:
                    restoring.restore(found)
            except UserError:
                refused += 1
    assert refused > 0.5 * len(some) * len(WRONG) / 3


def _chunks(content: dict[str, Any], name: str = "model/0.weight") -> list[dict[str, Any]]:
    chunks: list[dict[str, Any]] = content["tensors"][name]["chunks"]
    return chunks


def _halves(content: dict[str, Any]) -> None:
    chunk = _chunks(content)[0]
    _chunks(content)[:] = [
        {**chunk, "shape": [1, 3]},
        {**chunk, "shape": [1, 3], "offsets": [0, 0], "key": "other"},
    ]


CRAFTED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no chunks": lambda content: _chunks(content).clear(),
    "a chunk thousands of times": lambda content: _chunks(content).extend(_chunks(content) * 3000),
    "a hole and an overlap": _halves,
    "a chunk beyond the end": lambda content: _chunks(content)[0].update(offsets=[1, 0]),
    "another update": lambda content: content.update(update=8),
    "a file of another name": lambda content: content["files"].update({"x\x1b[2J": content["files"][RANK]}),
    "names without end": lambda content: content["state"]["best"].update({"9" * 5000: 1.0}),
    "deep": lambda content: content["state"].update(progress=json.loads('{"a":' * 300 + "1" + "}" * 300)),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_what_no_run_writes_is_refused(saved: Path, name: str) -> None:
    content = content_of(saved)
    CRAFTED[name](content)
    rewritten(saved, content)
    with pytest.raises(DamagedCheckpointError, match=r"^manifest\.json (is not what|is of update|names files)"):
        read_checkpoint(saved)


def test_files_that_lead_elsewhere_or_nowhere_are_refused(saved: Path) -> None:
    checkpointer, _ = new(saved.parent)
    assert checkpointer.newest() is not None
    moved = (saved / RANK).rename(saved.parent / "elsewhere")
    for make in (lambda path: path.symlink_to(moved), os.mkfifo):
        make(saved / RANK)
        assert (
            checked(saved, rank=0, gather=lambda entry: [entry])[1] == f"{RANK} can't be read (it is no regular file)"
        )
        with pytest.raises(UserError, match=r"can't be read: it is no regular file"):
            checkpointer.restore(read_checkpoint(saved))
        (saved / RANK).unlink()
    moved.rename(saved / RANK)
    manifest = (saved / MANIFEST).rename(saved.parent / "manifest")
    for make in (lambda path: path.symlink_to(manifest), os.mkfifo):
        make(saved / MANIFEST)
        with pytest.raises(DamagedCheckpointError, match=r"^manifest\.json can't be read \(.* it is no regular file"):
            read_checkpoint(saved)
        (saved / MANIFEST).unlink()
    with (saved / MANIFEST).open("wb") as file:
        file.truncate(1 << 40)  # takes no room
    with pytest.raises(DamagedCheckpointError, match=r"it is larger than"):
        read_checkpoint(saved)
    (saved.parent / "runs").mkdir()
    (saved.parent / "runs" / saved.name).symlink_to(saved)
    assert Checkpointer(saved.parent / "runs", *_model()).newest() is None


def _model() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(1, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def test_hashes_are_right(saved: Path) -> None:
    """Else the tests above would show nothing."""
    rewritten(saved, content_of(saved))
    assert checked(saved, rank=0, gather=lambda entry: [entry])[1] == ""
