"""Trained models: their checkpoints, configurations and weights."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from distaccum.checkpoints import Checkpoint, averaged_weights, checked, checkpoints_in, load_model, newest_whole
from distaccum.checkpoints.form import Form, is_dict, misfit
from distaccum.config import flat
from distaccum.config import instantiate as targets
from distaccum.config.enums import Weights, WhichCheckpoint
from distaccum.config.redaction import REDACTED, hide
from distaccum.errors import UserError
from distaccum.runtime.world import World
from distaccum.training.export import load_initial
from distaccum.training.model import options_of
from distaccum.training.progress import check_progress
from distaccum.training.run_folder import CHECKPOINTS, refuse_links

_OPEN_TO_CHANGE = (
    *("data.", "task.", "precision.name", "train.eval_batch_size"),
    *("model.name_or_path", "model.init_from"),  # files may have been moved
)
_IN_COMMON = ("data.evaluation.", "data.collate_fn", "task.")
"""Keys that must be equal for the members' metrics to be comparable."""
_OWN = ("distaccum.data", "distaccum.models", "distaccum.tasks")
"""Modules in which nothing imports or calls an object by a name that it is given."""
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
        config: its training's configuration with the changes of this evaluation, as plain dictionaries.
    """

    checkpoint: Checkpoint
    config: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.checkpoint.path)


def find_members(
    paths: Sequence[Path], which: WhichCheckpoint, overrides: Sequence[str], world: World, trust: Sequence[str] = ()
) -> list[Member]:
    """Returns the checkpoints to evaluate (see `Wishes`), which are whole. All ranks call it.

    Raises:
        UserError: there is none, one is damaged or no training's, an override names no key, or the configuration names
            an object that is not trusted.
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
    with world.together():
        refuse_links(path, CHECKPOINTS)
    folders = world.from_main(checkpoints_in(path / CHECKPOINTS) or checkpoints_in(path))
    if not folders:
        if not world.from_main(os.path.exists(path)):
            return _nothing_in(path, "there is no such folder")
        found, problem = checked(path, rank=world.rank, gather=world.gather)
        return [found] if found is not None else _nothing_in(path, problem)
    newest = newest_whole(folders[0].parent, rank=world.rank, gather=world.gather)
    if newest is None:
        return _nothing_in(path, "all of its checkpoints are damaged")
    if which is WhichCheckpoint.newest:
        return [newest]
    whole = [checked(entry, rank=world.rank, gather=world.gather)[0] for entry in reversed(folders)]
    entries = [entry for entry in whole if entry is not None]
    if which is WhichCheckpoint.all:
        return entries
    ranking = {int(number): value for number, value in newest.state["best"].items()}
    kept = [entry for entry in entries if entry.update in ranking]
    if not kept:
        raise UserError(
            f"{path} has no best checkpoint: the run kept none. Train with checkpoint.keep_best=1, or leave out "
            "--which best."
        )
    return [min(kept, key=lambda entry: ranking[entry.update])]


def _nothing_in(path: Path, problem: str) -> list[Checkpoint]:
    raise UserError(
        f"{path}: there is no checkpoint to evaluate: {problem}. Give the folder of a run, or of a checkpoint "
        "(`update-…`)."
    )


def _configured(checkpoint: Checkpoint, overrides: Sequence[str], trust: Sequence[str]) -> dict[str, Any]:
    check_progress(checkpoint, "In your own loop, restore it and call distaccum.evaluate_model.")
    config: dict[str, Any] = checkpoint.state["progress"]["config"]
    if (where := misfit(config, _CONFIG)) is not None:
        raise UserError(f"{checkpoint.path}: its configuration is not as a run saves it: config{where}.")
    for override in overrides:
        key, _, text = override.partition("=")
        if key == "model.init_from" and not checkpoint.frozen:
            raise UserError(f"{override}: {checkpoint.path} holds all weights of the model. Leave it out.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        config = _changed(config, key, value)
    built = {name: config[name] for name in ("data", "model", "task")}
    for key, value in flat(built).items():
        if REDACTED in str(value):
            raise UserError(f"{key} is a secret, which is not in the checkpoint: give it again, as in {key}=…")
    _check_trusted(built, [override.partition("=")[0] for override in overrides], trust)
    hide(config)
    return config


def _check_trusted(config: dict[str, Any], given: Collection[str], trusted: Collection[str]) -> None:
    """Refuses names of objects that are neither this package's, nor trusted, nor given on the command line.

    No refused object is imported.

    Args:
        config: the sections to build.
        given: keys of the command line.
        trusted: import paths of modules, and of single classes and functions.

    Raises:
        UserError: an object is refused; or a value would be resolved here, as `${oc.env:…}`, which no run saves.
    """
    for key, value in _leaves(config):
        if not isinstance(value, str) or any(f"{key}.".startswith(f"{own}.") for own in given):
            continue
        if "${" in value:
            raise UserError(f"{key}={value} in the checkpoint is no value that a run has saved. Give it, as in {key}=…")
        if key.endswith(f".{targets.TARGET}") and not _is_trusted(value, key, trusted):
            raise UserError(
                f"{key}={value} is named by the checkpoint alone, and whoever made that could name any code to run. If "
                f"you trust it, say so: --trust {value}, or --trust {value.partition('.')[0]} for all of that package."
            )


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        for name, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(entry, f"{key}.{name}".lstrip("."))
    else:
        yield key, value


def _is_trusted(target: str, key: str, trusted: Collection[str]) -> bool:
    if target in trusted:
        return True
    homes = tuple(f"{home}." for home in (*_OWN, *trusted))
    if not target.startswith(homes):
        return False
    # A module's attributes include whatever it has imported: the module that defines the object counts.
    found = targets.locate(target, key.removesuffix(f".{targets.TARGET}"))
    return f"{getattr(found, '__module__', '')}.".startswith(homes)


def _changed(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    known = [name for name in flat(config) if name.startswith(_OPEN_TO_CHANGE)]
    section, _, name = key.rpartition(".")
    is_section = key != "model" and any(other.startswith(f"{key}.") for other in known)
    is_new_argument = bool(name) and any(other.startswith(f"{section}.") for other in known)
    if is_section and not isinstance(value, dict) and not (key == "data.evaluation" and value is None):
        inside = next(other for other in known if other.startswith(f"{key}."))
        raise UserError(f"{key}={value} is impossible: {key} is a section. Give its keys one by one, as in {inside}=…")
    if key in known or is_section:
        return _put(config, key.split("."), value)
    if key.startswith(_OPEN_TO_CHANGE) and is_new_argument and f"{section}._target_" in known:
        return _put(config, key.split("."), value)
    if key in config or key in flat(config):
        raise UserError(
            f"{key} can't be changed for an evaluation, as the model was trained with it. Keys that can be changed are "
            "those of data and task, precision.name, train.eval_batch_size, model.name_or_path and model.init_from."
        )
    raise UserError(f"there is no key {key} in the training's configuration. There are: {', '.join(known)}.")


def _put(config: dict[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    if len(path) == 1:
        return {**config, path[0]: value}
    return {**config, path[0]: _put(config[path[0]], path[1:], value)}


def _differences(members: Sequence[Member]) -> list[tuple[str, list[str]]]:
    """Returns the keys that must be equal and aren't, with their values."""
    configs = [
        {key: value for key, value in flat(member.config).items() if f"{key}.".startswith(_IN_COMMON)}
        for member in members
    ]
    values = {
        key: list(dict.fromkeys(repr(config.get(key)) for config in configs)) for key in sorted(set().union(*configs))
    }
    return [(key, several) for key, several in values.items() if len(several) > 1]


def load_weights(module: nn.Module, member: Member, weights: Weights) -> None:
    """Loads a checkpoint's weights into a plain module, and first those of `model.init_from` if it leaves some out.

    Raises:
        UserError: the weights are another model's, or the checkpoint has no such average.
    """
    initial = options_of(member.config["model"])[1].get("init_from")
    if member.checkpoint.frozen and initial:
        load_initial(module, str(initial))
    kind = None if weights is Weights.raw else weights.value
    if kind is not None:
        averaged = averaged_weights(member.checkpoint, kind)
        if averaged is None:
            raise UserError(
                f"{member.name} has no {kind} weights: the run kept no such average. Leave out --weights {kind}, or "
                f"train with train.{kind}."
            )
        if averaged == 0:
            raise UserError(
                f"{member.name} has no {kind} weights: the average begins later than update "
                f"{member.checkpoint.update}. Name a later checkpoint, or leave out --weights {kind}."
            )
    load_model(member.checkpoint, module, kind)
