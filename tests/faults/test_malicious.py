"""Checkpoints that somebody has tampered with: what they hold is never run. Secrets, which no file is to hold."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import current, outcome, undisturbed
from safetensors.torch import load_file, save_file
from starting import RUN, STEPS, Starter
from troubles import trouble

from distaccum.checkpoints.folder import MANIFEST, write_manifest

pytestmark = pytest.mark.usefixtures("here")

NEWEST = Path("run/checkpoints/update-00000006")
KEEP = "checkpoint.keep_last=3"


class Payload:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("PWNED",)


def pickled() -> bytes:
    return pickle.dumps(Payload())


def test_the_payload_works() -> None:
    pickle.loads(pickled())
    assert Path("PWNED").exists()
    Path("PWNED").rmdir()
    torch.save({"model": Payload()}, "archive.pt")
    torch.load("archive.pt", weights_only=False)
    assert Path("PWNED").exists()


def replaced_by_pickle(name: str) -> Callable[[Path], None]:
    def tamper(checkpoint: Path) -> None:
        (checkpoint / name).write_bytes(pickled())

    return tamper


def replaced_by_archive(name: str) -> Callable[[Path], None]:
    def tamper(checkpoint: Path) -> None:
        torch.save({"model": Payload()}, checkpoint / name)

    return tamper


def rewrite_manifest(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes what the manifest says, and makes its hash and those of files right again: anybody can."""
    content = json.loads((checkpoint / MANIFEST).read_text())["content"]
    change(content)
    for name, entry in content["files"].items():
        path = checkpoint / name
        if path.is_file():
            entry |= {"bytes": path.stat().st_size, "blake2b": _hash(path)}
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint, content)


def _hash(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def pickle_with_the_right_hash(checkpoint: Path) -> None:
    replaced_by_pickle("rank-00000.safetensors")(checkpoint)
    rewrite_manifest(checkpoint, lambda content: None)


def archive_with_the_right_hash(checkpoint: Path) -> None:
    replaced_by_archive("rank-00000.safetensors")(checkpoint)
    rewrite_manifest(checkpoint, lambda content: None)


def file_outside(checkpoint: Path) -> None:
    shutil.copy(checkpoint / "rank-00000.safetensors", checkpoint.parent / "outside.safetensors")

    def change(content: dict[str, Any]) -> None:
        content["files"]["../outside.safetensors"] = content["files"].pop("rank-00000.safetensors")
        for tensor in content["tensors"].values():
            for chunk in tensor["chunks"]:
                chunk["file"] = "../outside.safetensors"

    rewrite_manifest(checkpoint, change)


def of_other_tensors(checkpoint: Path) -> None:
    name = "rank-00000.safetensors"
    tensors = {key: value[:1].clone() if value.ndim else value for key, value in load_file(checkpoint / name).items()}
    save_file(tensors, checkpoint / name)
    rewrite_manifest(checkpoint, lambda content: None)


def file_not_listed(checkpoint: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        next(iter(content["tensors"].values()))["chunks"][0]["file"] = "/etc/passwd"

    rewrite_manifest(checkpoint, change)


def without(key: str) -> Callable[[Path], None]:
    def tamper(checkpoint: Path) -> None:
        rewrite_manifest(checkpoint, lambda content: content.pop(key) and None)

    return tamper


def nested_deeply(checkpoint: Path) -> None:
    text = "[" * 100_000
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    (checkpoint / MANIFEST).write_text(f'{{"blake2b": "{digest}", "content":\n{text}\n}}\n')


def of_torchs_own_format(checkpoint: Path) -> None:
    for path in checkpoint.iterdir():
        path.unlink()
    (checkpoint / ".metadata").write_bytes(pickled())
    (checkpoint / "__0_0.distcp").write_bytes(pickled())


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "manifest is a pickle": (replaced_by_pickle(MANIFEST), "manifest.json"),
    "manifest is an archive": (replaced_by_archive(MANIFEST), "manifest.json"),
    "tensors are a pickle": (replaced_by_pickle("rank-00000.safetensors"), "rank-00000.safetensors has"),
    "tensors are an archive": (replaced_by_archive("rank-00000.safetensors"), "rank-00000.safetensors has"),
    "tensors are a pickle, with the right hash": (pickle_with_the_right_hash, "rank-00000.safetensors"),
    "tensors are an archive, with the right hash": (archive_with_the_right_hash, "rank-00000.safetensors"),
    "a file outside": (file_outside, "manifest.json names files that are not the checkpoint's"),
    "a file that is not listed": (file_not_listed, "manifest.json names files that are not the checkpoint's"),
    "other tensors": (of_other_tensors, "rank-00000.safetensors doesn't hold the tensors that manifest.json names"),
    "a manifest that is nested too deeply": (nested_deeply, "manifest.json is not as it was written"),
    "no tensors": (without("tensors"), "manifest.json"),
    "no state": (without("state"), "manifest.json"),
    "no update": (without("update"), "manifest.json"),
    "no files": (lambda path: _drop_files(path), "manifest.json"),
    "torch's own format": (of_torchs_own_format, "manifest.json is missing"),
}


def _drop_files(checkpoint: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["files"] = {}

    rewrite_manifest(checkpoint, change)


@pytest.fixture(scope="module")
def saved(runs: Starter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in update 8, with checkpoints of updates 6 and 4."""
    folder = tmp_path_factory.mktemp("saved")
    with current(folder):
        troubles = [trouble("forward", "SIGKILL", nth=7 * STEPS + 1)]
        assert runs.run(*RUN, "checkpoint.async_save=false", troubles=troubles).statuses == [-9]
    return folder / "run"


@pytest.mark.parametrize("name", REFUSED)
def test_a_checkpoint_that_was_tampered_with_is_refused(runs: Starter, saved: Path, name: str) -> None:
    tamper, said = REFUSED[name]
    shutil.copytree(saved, "run")
    tamper(NEWEST)
    message = runs.run(*RUN, "run_dir=other", f"resume={NEWEST}").message
    assert message.startswith(f"resume={NEWEST}: there is no checkpoint to go on from: ")
    assert said in message
    ended = runs.run(*RUN)
    assert ended.statuses == [0], ended
    assert f"the checkpoint {NEWEST} is damaged and passed over: " in ended.out
    assert "going on from run/checkpoints/update-00000004" in ended.out
    assert outcome() == undisturbed(runs)
    assert not Path("PWNED").exists()


def test_what_a_checkpoint_says_of_the_configuration_is_never_built(runs: Starter, saved: Path) -> None:
    shutil.copytree(saved, "run")
    payload = {"_target_": "os.mkdir", "path": "PWNED"}

    def change(content: dict[str, Any]) -> None:
        config = content["state"]["progress"]["config"]
        config["observers"] = {"mine": payload}
        config["model"] = {**payload, "${oc.env:HOME}": "${oc.env:HOME}"}
        config["data"]["train"] = payload
        content["state"]["states"]["accumulator"]["_target_"] = payload

    rewrite_manifest(NEWEST, change)
    ended = runs.run(*RUN)
    assert ended.statuses == [0], ended
    assert f"going on from {NEWEST}" in ended.out
    assert outcome() == undisturbed(runs)
    assert not Path("PWNED").exists()


# Secrets

KEY = "key-4711-secret-of-mine"
VARIABLES = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf-token-of-mine-0815",
    "AWS_SECRET_ACCESS_KEY": "aws+secret/of-mine==",
    "DB_PASSWORD": "correct horse battery",
    "MY_API_KEY": KEY,
}
READ = {"MINE": "value-of-no-telling-name"}
"""What the configuration reads, although neither the variable nor the key says that it is a secret."""
OBSERVED = [
    "+observers.mine._target_=troubles.Boastful",
    "+observers.mine.api_key=${oc.env:MY_API_KEY}",
    "+observers.mine.mail={user: '${oc.env:MINE}', url: 'smtp://me:in-a-url-0816@host/', headers: "
    "{Authorization: 'Basic aW4tYS1oZWFkZXI='}, auth: [me, in-a-list-0817], pwd: and-pwd-0818}",
]
WRITTEN_OUT = ("in-a-url-0816", "aW4tYS1oZWFkZXI=", "in-a-list-0817", "and-pwd-0818")


def holders(folder: Path, text: str) -> list[str]:
    """Files that hold a text, in any of its usual guises."""
    forms = [text.encode(), json.dumps(text).encode()[1:-1], text.encode().hex().encode()]
    return [
        str(path) for path in folder.rglob("*") if path.is_file() and any(form in path.read_bytes() for form in forms)
    ]


def test_secrets_are_in_no_file_of_a_run(runs: Starter) -> None:
    trackers = "observers=[csv,tensorboard]"
    settings = [*OBSERVED, trackers, "wandb.mode=offline", "checkpoint.async_save=false"]
    settings = [*(entry for entry in RUN if not entry.startswith("wandb")), *settings]
    variables = {**VARIABLES, **READ}
    broken = runs.run(*settings, "+observers.mine.fails_at=5", **variables)
    assert broken.statuses == [1], broken
    assert "RuntimeError: can't log in with" in Path("run/logs/rank0.log").read_text()
    assert "RuntimeError: can't log in with" in broken.err
    stopped = runs.run(*settings, troubles=[trouble("forward", "SIGTERM", nth=STEPS)], **variables)
    assert stopped.statuses == [75], stopped
    assert runs.run(*settings, ranks=2, **variables).statuses == [0, 0]
    for value in (*variables.values(), *WRITTEN_OUT):
        assert holders(Path(), value) == [], "the output of the processes is in there, too"
    assert holders(Path("run"), "troubles.Boastful"), "what is to be found is found"
    for logged in ("offline-run", "csv/updates.csv", "tensorboard/events"):
        assert any(logged in path for path in holders(Path("run"), "grad_norm"))


def test_a_secret_on_the_command_line_is_in_no_file_either(runs: Starter) -> None:
    settings = [entry for entry in RUN if not entry.startswith("wandb")]
    ended = runs.run(*settings, OBSERVED[0], f"+observers.mine.api_key={KEY}", "wandb.mode=offline")
    assert ended.statuses == [0], ended
    assert holders(Path("run"), KEY) == []
