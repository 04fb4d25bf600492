"""Tampers with what commands read, at random: checkpoints, run folders, weights, studies, tokens, indexes, images.

What is done is a function of the seed alone, as long as the folder that is tampered with has the same files.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import socket
import stat
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from command_line import TINY

_IMAGES = [
    *("model=cnn", "model.channels=[8]", "task=classification", "data.image_size=8", "model.num_classes=2"),
    *("train.max_updates=2", "batch.global_batch_size=8", "wandb.mode=disabled", "data.evaluation=null"),
]
_TRAINING = [*TINY, "train.eval_every=2", "checkpoint.every_updates=2", "checkpoint.keep_last=3", "train.ema.decay=0.9"]
_TRAINING += ["checkpoint.async_save=false", "observers=[csv]"]
_WITH_TOKENS = [
    *("data=tokens", "data.files=tokens", "data.max_length=16", "data.evaluation=null", "model=gpt", "model.width=16"),
    *(
        "model.num_layers=1",
        "model.num_heads=2",
        "task=language_modeling",
        "train.max_updates=2",
        "wandb.mode=disabled",
    ),
    "batch.global_batch_size=8",
]
_WITH_ROWS = [
    *("data=jsonl", "data.files=rows.jsonl", "data.evaluation=null", "model=mlp", "model.hidden_sizes=[4]"),
    *(
        "model.input_shape=[2]",
        "model.num_classes=3",
        "data.transform={_target_: tampering.of_row, _partial_: true}",
        "wandb.mode=disabled",
    ),
    *("batch.global_batch_size=8", "train.max_updates=2", "task=classification"),
]


def of_row(row: dict[str, Any]) -> tuple[torch.Tensor, int]:
    return torch.tensor(row["values"], dtype=torch.float32), row["label"]


@dataclass(frozen=True, slots=True)
class Reading:
    """A command that reads what somebody may have tampered with.

    Attributes:
        folders: what it reads, in which it may be tampered with.
        words: the command, with its name first.
        is_own: they are data, which a user has put where they are, links and all.
    """

    folders: tuple[str, ...]
    words: tuple[str, ...]
    is_own: bool = False


READINGS = {
    "resume": Reading(("run",), ("train", *_TRAINING, "run_dir=run", "train.max_updates=8")),
    "resume from": Reading(("run",), ("train", *_TRAINING, "run_dir=new", "resume=run", "train.max_updates=8")),
    "evaluate": Reading(("run",), ("evaluate", "run", "--weights=ema", "--which=newest")),
    "evaluate all": Reading(("run",), ("evaluate", "run", "--which=all", "--combine=weights")),
    "report": Reading(("run",), ("report", "run", "other", "--out=page.html")),
    "report alone": Reading(("run",), ("report", "run")),
    "study": Reading(
        ("study",),
        (
            *("study", *TINY, "run_dir=study", "study.batch_sizes=[16]", "study.lr_rules=[none]"),
            *("study.max_samples=64", "study.evaluations=2"),
        ),
    ),
    "initial weights": Reading(("weights",), ("train", *TINY, "run_dir=new", "model.init_from=weights"), is_own=True),
    "tokens": Reading(("tokens",), ("train", *_WITH_TOKENS, "run_dir=new"), is_own=True),
    "tokenize": Reading(
        ("tokens",),
        ("data.tokenize", "texts.jsonl", "--tokenizer=tokenizer", "--out=tokens", "--workers=1", "--shard-tokens=400"),
    ),
    "tokenizer": Reading(
        ("tokenizer",),
        ("data.tokenize", "texts.jsonl", "--tokenizer=tokenizer", "--out=new", "--workers=1"),
        is_own=True,
    ),
    "rows": Reading((".distaccum", "rows.jsonl"), ("train", *_WITH_ROWS, "run_dir=new"), is_own=True),
    "tars": Reading(
        ("tars",), ("train", "data=webdataset", "data.shards=tars/*.tar", *_IMAGES, "run_dir=new"), is_own=True
    ),
    "images": Reading(
        ("photos", "cache"), ("train", "data=image_folder", "data.root=photos", *_IMAGES, "run_dir=new"), is_own=True
    ),
}


def prepare(folder: Path, start: Callable[..., Any]) -> None:
    """Makes what the commands read, by the commands themselves.

    Args:
        start: runs Python in a folder, as `forking.start` does.
    """

    def done(*words: str) -> None:
        ended = start(*words, folder=folder).ended()
        assert ended.status == 0, ended

    (folder / "rows.jsonl").write_text("".join(f'{{"values": [{n}, 1], "label": {n % 3}}}\n' for n in range(64)))
    (folder / "texts.jsonl").write_text("".join(f'{{"text": "one two {n}"}}\n' for n in range(64)))
    _make_images(folder)
    done("-c", "import tiny_language_model; tiny_language_model.tokenizer().save_pretrained('tokenizer')")
    done("-m", "distaccum.train", *_TRAINING, "run_dir=run", "train.max_updates=6")
    shutil.copytree(folder / "run", folder / "other")
    (folder / "weights").mkdir()
    shutil.copy(folder / "run" / "model.safetensors", folder / "weights" / "part-1.safetensors")
    names = ["layers.1.weight", "layers.1.bias", "layers.3.weight", "layers.3.bias"]
    from safetensors import safe_open

    with safe_open(folder / "weights" / "part-1.safetensors", framework="pt") as file:
        names = list(file.keys())
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "part-1.safetensors")}
    (folder / "weights" / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("study", "tokenize", "tokens", "rows", "tars", "images"):
        command, *words = READINGS[name].words
        done("-m", f"distaccum.{command}", *words)
        shutil.rmtree(folder / "new", ignore_errors=True)


def _make_images(folder: Path) -> None:
    from PIL import Image

    (folder / "tars").mkdir()
    for label in "ab":
        (folder / "photos" / label).mkdir(parents=True)
        with tarfile.open(folder / "tars" / f"{label}.tar", "w") as tar:
            for number in range(12):
                path = folder / "photos" / label / f"{number}.png"
                Image.new("RGB", (8, 8), (number * 9, number, 100 * (label == "a"))).save(path)
                for extension, content in (("png", path.read_bytes()), ("cls", str(number % 2).encode())):
                    member = tarfile.TarInfo(f"{label}{number}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


# What is done to files


class Payload:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("PWNED",)


_ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    1.5,
    1 << 70,
    -(1 << 40),
    1e308,
    "",
    "text",
    "../outside/secret.json",
    "/etc/passwd",
]
_ODD += [
    [],
    {},
    [[]],
    [{}],
    {"a": []},
    "\x1b[2J\u202e",
    "x" * 100_000,
    [0] * 5000,
    "\ud800",
    {"__tensor__": ["float32", [1 << 50], []]},
]
_ODD += [
    {"_target_": "os.mkdir", "path": "PWNED"},
    {"_target_": "builtins.eval", "_args_": ["1"]},
    "${oc.env:HOME}",
    "..",
    ".",
]
_ODD += [
    "run/../../outside/secret.json",
    {"__kept__": [10**9, [], True]},
    "nan",
    float("inf"),
    float("nan"),
    {"__tuple__": 3},
]
_WORDS = [
    b"\xff\xfe\x00",
    b"\x00" * 100,
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"",
    b"\n\n\n",
    b"null",
    b"1e999",
    b"{}",
    b"[]",
    b'"',
]
_WORDS += [
    b'{"a": NaN, "a": 1}',
    b"9" * 10_000,
    b"\xef\xbb\xbf{}",
    b"a: &a [*a]",
    b"!!python/object/apply:os.mkdir [PWNED]",
    b"\x89HDF",
]


def tamper(folder: Path, reading: Reading, seed: int) -> str:
    """Tampers with one or two files that a command reads; returns what it has done."""
    chance = random.Random(seed)
    said = []
    for _ in range(chance.choice([1, 1, 1, 2])):
        files = [path for name in reading.folders for path in _below(folder / name)]
        path = chance.choice(files)
        kinds = [*_ON_ANY, *(_ON_CONTENT * 2 if path.is_file() and not path.is_symlink() else [])]
        kinds += [change for ending, changes in _ON_KIND.items() if _is_kind(path, ending) for change in changes * 6]
        if reading.is_own:
            kinds = [change for change in kinds if change is not _immense]  # of data it would just take long
        change = chance.choice(kinds)
        said.append(f"{change.__name__.strip('_')} {path.relative_to(folder)}")
        change(path, chance)
    return " and ".join(said)


def _is_kind(path: Path, ending: str) -> bool:
    return path.is_file() and not path.is_symlink() and path.name.endswith(ending)


def _below(top: Path) -> Iterator[Path]:
    """Files and folders, in the order of their names."""
    if top.is_dir() and not top.is_symlink():
        for path in sorted(top.rglob("*")):
            if not path.name.endswith((".lock", ".svg", ".html")):
                yield path
    if top.is_file():
        yield top


def _removed(path: Path, chance: random.Random) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _a_folder(path: Path, chance: random.Random) -> None:
    _removed(path, chance)
    path.mkdir()


def _a_pipe(path: Path, chance: random.Random) -> None:
    _removed(path, chance)
    os.mkfifo(path)


def _a_device(path: Path, chance: random.Random) -> None:
    _removed(path, chance)
    try:
        os.mknod(path, 0o644 | stat.S_IFCHR, os.makedev(1, 5))  # zeros without end
    except PermissionError:
        path.symlink_to("/dev/zero")


def _a_socket(path: Path, chance: random.Random) -> None:
    _removed(path, chance)
    here = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(f"/proc/self/fd/{here}/{path.name}")
    os.close(here)


def _a_loop(path: Path, chance: random.Random) -> None:
    _removed(path, chance)
    path.symlink_to(path.name)


def _a_link_outside(path: Path, chance: random.Random) -> None:
    """To what it was itself, and now lies outside of all folders that the command was given."""
    moved = _root(path).parent / "outside" / path.name
    if not moved.exists():
        shutil.move(path, moved)
    _removed(path, chance)
    path.symlink_to(moved)


def _a_link_to_a_secret(path: Path, chance: random.Random) -> None:
    root = _root(path)
    _removed(path, chance)
    path.symlink_to(root.parent / "outside" / "secret.json")


def _root(path: Path) -> Path:
    return next(folder for folder in path.parents if folder.name == "here")


def _without_permission(path: Path, chance: random.Random) -> None:
    if not path.is_symlink():
        path.chmod(0)


def _swapped(path: Path, chance: random.Random) -> None:
    others = [other for other in sorted(path.parent.iterdir()) if other != path]
    if others:
        other = chance.choice(others)
        path.rename(path.parent / ".swap")
        other.rename(path)
        (path.parent / ".swap").rename(other)


def _of_a_strange_name(path: Path, chance: random.Random) -> None:
    names = [
        b"\xff\xfe",
        b"a\nb",
        b"update-99999999999999999999",
        b"update-00000009",
        b"x" * 250,
        b"\xe2\x80\xae",
        b"-rf",
    ]
    os.rename(os.fsencode(path), os.path.join(os.fsencode(path.parent), chance.choice(names)))


def _flipped(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice([1, 3, 100]) if content else 0):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def _shortened(path: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(len(content) + 1)])


def _lengthened(path: Path, chance: random.Random) -> None:
    with path.open("ab") as file:
        file.write(chance.choice([b"\x00" * 5000, chance.randbytes(1000), b"\n{", *_WORDS]))


def _replaced(path: Path, chance: random.Random) -> None:
    path.write_bytes(chance.choice([chance.randbytes(3000), *_WORDS]))


def _a_pickle(path: Path, chance: random.Random) -> None:
    path.write_bytes(pickle.dumps(Payload()))


def _an_archive(path: Path, chance: random.Random) -> None:
    torch.save({"model": Payload()}, path)


def _immense(path: Path, chance: random.Random) -> None:
    with path.open("r+b") as file:
        file.truncate(1 << 42)  # takes no room


_ON_ANY = [_removed, _a_folder, _a_pipe, _a_device, _a_socket, _a_loop, _a_link_outside, _a_link_to_a_secret]
_ON_ANY += [_without_permission, _swapped, _of_a_strange_name]
_ON_CONTENT = [_flipped, _shortened, _lengthened, _replaced, _a_pickle, _an_archive, _immense]


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _places(entry, (*path, key))


def _with_odd_value(value: Any, chance: random.Random) -> Any:
    """A value with something else at a random place, or without it, or under another key."""
    places = list(_places(value))
    place = chance.choice(places)
    if not place:
        return chance.choice(_ODD)
    holder = value
    for key in place[:-1]:
        holder = holder[key]
    match chance.randrange(6):
        case 0:
            del holder[place[-1]]
        case 1 if isinstance(holder, dict):
            holder[chance.choice(["../outside/secret.json", "x" * 1000, "", "1", "\x1b[2J", "_target_"])] = holder.pop(
                place[-1]
            )
        case _:
            holder[place[-1]] = chance.choice(_ODD)
    return value


def _odd_json(path: Path, chance: random.Random) -> None:
    path.write_text(json.dumps(_with_odd_value(_json(path.read_bytes()), chance)))


def _odd_line(path: Path, chance: random.Random) -> None:
    lines = path.read_bytes().split(b"\n")
    place = chance.randrange(len(lines))
    lines[place] = json.dumps(_with_odd_value(_json(lines[place]), chance)).encode()
    path.write_bytes(b"\n".join(lines))


def _odd_yaml(path: Path, chance: random.Random) -> None:
    try:
        content = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, RecursionError):
        content = {}
    path.write_text(json.dumps(_with_odd_value(content, chance)))  # which is YAML too


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return {}


def _odd_manifest(path: Path, chance: random.Random) -> None:
    """With the hash of what it says now, and those of the files: anybody can make them."""
    content = _json(path.read_bytes())
    content = content.get("content", {}) if isinstance(content, dict) else {}
    content = _with_odd_value(content, chance)
    text = json.dumps(content, separators=(",", ":"))
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    path.write_text(f'{{"blake2b": "{digest}", "content":\n{text}\n}}\n')


def _odd_tensors(path: Path, chance: random.Random) -> None:
    """With another header of the right length, or a length that is not right; and the manifest's hash made right."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = _json(content[8 : 8 + length]) if length < len(content) else {}
    text = json.dumps(_with_odd_value(header, chance)).encode()
    size = chance.choice([len(text)] * 3 + [0, 1, len(text) + 1, 1 << 30, (1 << 63) - 1, (1 << 64) - 1])
    path.write_bytes(size.to_bytes(8, "little") + text + content[8 + length :])
    manifest = path.parent / "manifest.json"
    if manifest.is_file() and not manifest.is_symlink():
        said = _json(manifest.read_bytes())
        said = said.get("content") if isinstance(said, dict) else None
        if (
            isinstance(said, dict)
            and isinstance(said.get("files"), dict)
            and isinstance(said["files"].get(path.name), dict)
        ):
            digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
            said["files"][path.name] |= {"bytes": path.stat().st_size, "blake2b": digest}
            text = json.dumps(said, separators=(",", ":")).encode()
            digest = hashlib.blake2b(text, digest_size=16).hexdigest()
            manifest.write_bytes(b'{"blake2b": "%s", "content":\n%s\n}\n' % (digest.encode(), text))


def _odd_array(path: Path, chance: random.Random) -> None:
    """With another header: a shape without end, objects (which would be unpickled), another order."""
    kinds = ["'|O'", "'<u2'", "'>u4'", "[('a', '<u2')]", "__import__('os').mkdir('PWNED')", "(" * 5000]
    shapes = ["(1,)", "(1152921504606846976,)", "(-1,)", "(3, 5)", "()", "None"]
    said = "{'descr': %s, 'fortran_order': %s, 'shape': %s, }"
    descriptions = [said % (kind, chance.random() < 0.5, shape) for kind in kinds for shape in shapes]
    text = chance.choice(descriptions).encode() + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + (len(text) % 65536).to_bytes(2, "little") + text + pickle.dumps(Payload()))


def _of_objects(path: Path, chance: random.Random) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([Payload()], dtype=object), allow_pickle=True)


def _odd_tar(path: Path, chance: random.Random) -> None:
    """With members that lead elsewhere."""
    with tarfile.open(path, "w", format=chance.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])) as tar:
        for name in [
            "../outside/a.png",
            "/etc/a.png",
            "a/../../b.png",
            "x" * 300 + ".png",
            "c.png",
            "c.cls",
            "\u202e.cls",
        ]:
            member = tarfile.TarInfo(name)
            member.type = chance.choice(
                [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
            )
            member.linkname = "/etc/passwd"
            member.size = chance.choice([3, 0, 3]) if member.type == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(b"1\n\n"))
    if chance.random() < 0.3:
        content = bytearray(path.read_bytes())
        content[124:136] = chance.choice([b"77777777777\x00", b"\x80" + b"\xff" * 11, b"-0000000001\x00"])
        path.write_bytes(content)


_ON_KIND: dict[str, list[Callable[[Path, random.Random], None]]] = {
    ".json": [_odd_json],
    "manifest.json": [_odd_manifest],
    ".jsonl": [_odd_line],
    ".yaml": [_odd_yaml],
    ".safetensors": [_odd_tensors],
    ".npy": [_odd_array, _of_objects],
    ".ends": [_odd_array, _of_objects],
    "-index": [_odd_array, _of_objects],
    ".tar": [_odd_tar],
}
