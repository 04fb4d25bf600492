"""Trained models found again: their checkpoints, what they were configured with, and their weights."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from distaccum.checkpoints import Checkpoint, averaged_weights, checked, checkpoints_in, load_model, newest_whole
from distaccum.checkpoints.form import Form, is_dict, misfit
from distaccum.config import flat
from distaccum.config.enums import Weights, WhichCheckpoint
from distaccum.config.redaction import REDACTED, hide
from distaccum.errors import UserError
from distaccum.runtime.world import World
from distaccum.tools.evaluate.trust import check_trusted
from distaccum.training.progress import check_progress
from distaccum.training.run_folder import CHECKPOINTS

_OPEN_TO_CHANGE = ("data.", "task.", "precision.name", "train.eval_batch_size")
_IN_COMMON = ("data.evaluation.", "data.collate_fn", "task.")
"""What members must agree on for their figures to be comparable."""
_CONFIG: Form = {
    "data": {"train": is_dict},
    "model": is_dict,
    "task": is_dict,
    "precision": is_dict,
    "train": is_dict,
    "strategy": lambda value: value is None or (is_dict(value) and isinstance(value.get("wrap") or [], list)),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One trained model on the disk.

    Attributes:
        config: what it was trained with, and what has been changed of it since, as plain dictionaries.
    """

    checkpoint: Checkpoint
    config: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.checkpoint.path)


def find_members(
    paths: Sequence[Path],
    which: WhichCheckpoint,
    overrides: Sequence[str],
    world: World,
    trust: Sequence[str] = (),
) -> list[Member]:
    """The checkpoints that are meant, found whole. All ranks call it.

    Args:
        paths: folders of runs, or of single checkpoints.
        which: of a run's checkpoints.
        overrides: `KEY=VALUE`, changes to what the models were trained with.
        trust: modules, classes and functions that checkpoints may name, besides those of distaccum.

    Raises:
        UserError: there is none, one is damaged, it is no training's, an override names no key, or what is to be built
            is not trusted.
    """
    found = [checkpoint for path in paths for checkpoint in _checkpoints(path, which, world)]
    members = [Member(checkpoint=entry, config=_configured(entry, overrides, trust)) for entry in found]
    if different := _differences(members):
        key, values = different[0]
        more = f" (and {len(different) - 1} more keys)" if len(different) > 1 else ""
        raise UserError(
            f"the models were not made for the same data or task: {key} is {' and '.join(values)}{more}. Evaluate them "
            f"apart, or say what holds for all, as in {key}=…"
        )
    return members


def _checkpoints(path: Path, which: WhichCheckpoint, world: World) -> list[Checkpoint]:
    is_run = world.from_main(bool(checkpoints_in(path / CHECKPOINTS)))
    folder = path / CHECKPOINTS if is_run else path
    folders = world.from_main(checkpoints_in(folder))
    if not folders:
        if not world.from_main(os.path.exists(path)):
            return _nothing_in(path, "there is no such folder")
        found, problem = checked(path, rank=world.rank, gather=world.gather)
        return [_of_a_training(found)] if found is not None else _nothing_in(path, problem)
    newest = newest_whole(folder, rank=world.rank, gather=world.gather)
    if newest is None:
        return _nothing_in(path, "all of its checkpoints are damaged")
    if which is WhichCheckpoint.newest:
        return [_of_a_training(newest)]
    whole = [checked(entry, rank=world.rank, gather=world.gather)[0] for entry in reversed(folders)]
    entries = [entry for entry in whole if entry is not None]
    if which is WhichCheckpoint.all:
        return [_of_a_training(entry) for entry in entries]
    ranking = {int(number): value for number, value in newest.state["best"].items()}
    kept = [entry for entry in entries if entry.update in ranking]
    if not kept:
        raise UserError(
            f"{path} has no best checkpoint: the run kept none. Train with checkpoint.keep_best=1, or leave out "
            "--which best."
        )
    return [_of_a_training(min(kept, key=lambda entry: ranking[entry.update]))]


def _nothing_in(path: Path, problem: str) -> list[Checkpoint]:
    raise UserError(
        f"{path}: there is no checkpoint to evaluate: {problem}. Give the folder of a run, or of a checkpoint "
        "(`update-…`)."
    )


def _of_a_training(checkpoint: Checkpoint) -> Checkpoint:
    check_progress(checkpoint, "In your own loop, restore it and call distaccum.evaluate_model.")
    return checkpoint


def _configured(checkpoint: Checkpoint, overrides: Sequence[str], trust: Sequence[str]) -> dict[str, Any]:
    config: dict[str, Any] = checkpoint.state["progress"]["config"]
    if (where := misfit(config, _CONFIG)) is not None:
        raise UserError(f"{checkpoint.path}: its configuration is not as a run saves it: config{where}.")
    for override in overrides:
        key, _, text = override.partition("=")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        config = _changed(config, key, value)
    built = {name: config[name] for name in ("data", "model", "task")}
    for key, value in flat(built).items():
        if REDACTED in str(value):
            raise UserError(f"{key} is a secret, which is not in the checkpoint: give it again, as in {key}=…")
    check_trusted(built, [override.partition("=")[0] for override in overrides], trust)
    hide(config)
    return config


def _changed(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    known = [name for name in flat(config) if name.startswith(_OPEN_TO_CHANGE)]
    section, _, name = key.rpartition(".")
    is_section = any(other.startswith(f"{key}.") for other in known)
    is_new_argument = bool(name) and any(other.startswith(f"{section}.") for other in known)
    if is_section and not isinstance(value, dict) and not (key == "data.evaluation" and value is None):
        inside = next(other for other in known if other.startswith(f"{key}."))
        raise UserError(
            f"{key}={value} says nothing: {key} has keys of its own. Give them one by one, as in {inside}=…"
        )
    if key in known or is_section:
        return _put(config, key.split("."), value)
    if key.startswith(_OPEN_TO_CHANGE) and is_new_argument and f"{section}._target_" in known:
        return _put(config, key.split("."), value)
    if key in config or key in flat(config):
        raise UserError(
            f"{key} can't be changed for an evaluation: it belongs to what was trained. What can be changed is data, "
            "task, precision.name and train.eval_batch_size."
        )
    raise UserError(f"there is no key {key} in what was trained. There are: {', '.join(known)}.")


def _put(config: dict[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    if len(path) == 1:
        return {**config, path[0]: value}
    return {**config, path[0]: _put(config[path[0]], path[1:], value)}


def _differences(members: Sequence[Member]) -> list[tuple[str, list[str]]]:
    """Keys that members must agree on and don't, with their values."""
    configs = [
        {key: value for key, value in flat(member.config).items() if f"{key}.".startswith(_IN_COMMON)}
        for member in members
    ]
    keys = sorted(set().union(*configs))
    found = []
    for key in keys:
        values = dict.fromkeys(repr(config.get(key)) for config in configs)
        if len(values) > 1:
            found.append((key, list(values)))
    return found


def load_weights(module: nn.Module, member: Member, weights: Weights) -> None:
    """Puts a checkpoint's weights into a plain module.

    Raises:
        UserError: they are another model's, or there is no such average in the checkpoint.
    """
    kind = None if weights is Weights.raw else weights.value
    averaged = averaged_weights(member.checkpoint, kind) if kind is not None else None
    if kind is not None and averaged is None:
        raise UserError(
            f"{member.name} has no {kind} weights: the run kept no such average. Leave out --weights {kind}, or train "
            f"with train.{kind}."
        )
    if averaged == 0:
        raise UserError(
            f"{member.name} has no {kind} weights: the average begins later than update {member.checkpoint.update}. "
            f"Name a later checkpoint, or leave out --weights {kind}."
        )
    load_model(member.checkpoint, module, kind)
