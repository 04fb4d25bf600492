"""The evaluation of trained models: each alone, and all of them together."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.text import Text
from torch import nn

from distaccum.config import DataConfig
from distaccum.config import instantiate as targets
from distaccum.config.enums import Combination, DeviceChoice, PrecisionName, Weights, WhichCheckpoint
from distaccum.config.schemas import SCHEMAS
from distaccum.errors import UserError, printable
from distaccum.loaders import EvaluationLoader
from distaccum.models.ensemble import Ensemble, NotTogetherError, mean_of_weights
from distaccum.observers.formatting import number
from distaccum.planning import DEFAULT_MICRO_BATCH_SIZE
from distaccum.runtime.devices import Precision, cast, resolve_device, resolve_precision
from distaccum.runtime.files import write_result
from distaccum.runtime.logs import console
from distaccum.runtime.world import World, joined_world
from distaccum.tasks import CoupledTask, SumsTask
from distaccum.tools.bench.terminal import print_table, table_of
from distaccum.tools.evaluate.members import Member, find_members, load_weights
from distaccum.training.data import collate_fn, loader_options
from distaccum.training.evaluation import evaluated, evaluation_metrics
from distaccum.training.model import build_model
from distaccum.training.task import built_task


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """The models to evaluate, and the way to do it.

    Attributes:
        paths: folders of runs or of checkpoints.
        overrides: `KEY=VALUE`, changes of the configuration that the models were trained with.
        combine: how to combine several models. None: `probabilities`, where those can be combined.
        output: a file for the results as JSON.
        trust: modules, classes and functions that checkpoints may name, besides those of distaccum.
    """

    paths: Sequence[Path]
    overrides: Sequence[str] = ()
    which: WhichCheckpoint = WhichCheckpoint.newest
    weights: Weights = Weights.raw
    combine: Combination | None = None
    class_dim: int | None = None
    device: DeviceChoice = DeviceChoice.auto
    output: Path | None = None
    trust: Sequence[str] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateRow:
    """The metrics of one model, or of all of them together."""

    name: str
    update: int | None
    metrics: dict[str, float]


def evaluate(wishes: Wishes) -> int:
    """Evaluates on all ranks that the launcher has started, and prints the table on rank 0; returns the exit status.

    Raises:
        UserError: the checkpoints, the data or the machine don't allow the evaluation.
    """
    with joined_world() as world:
        device = resolve_device(wishes.device, world.local_rank)
        world.init_process_group(device)
        members = find_members(wishes.paths, wishes.which, wishes.overrides, world, wishes.trust)
        with world.together():
            examination = _Examination(members, wishes, world, device)
        rows = examination.rows(wishes.class_dim)
        with world.together():
            if world.is_main:
                _print(rows, examination, wishes)
    return 0


class _Examination:
    """Models, task and data on this rank's device. The constructor doesn't wait for another rank."""

    def __init__(self, members: Sequence[Member], wishes: Wishes, world: World, device: torch.device) -> None:
        config = members[0].config
        data = _typed(DataConfig, config["data"], "data")
        if data.evaluation is None:
            raise UserError(
                "the models were trained without evaluation data (data.evaluation=null): name some, as in "
                "'data.evaluation={_target_: distaccum.data.Digits, split: evaluation}'"
            )
        self.members = members
        self.device = device
        name = config["precision"]["name"]
        if name not in (names := [choice.name for choice in PrecisionName]):
            raise UserError(f"precision.name={name} is unknown: it must be one of {', '.join(names)}.")
        self.precision = resolve_precision(PrecisionName[name], device)
        self.task = built_task(_checked(config["task"], "task"))
        self.combine = self._combination(wishes)
        options = loader_options(data, device, self.precision)
        dataset = targets.build(data.evaluation, "data.evaluation")
        self.loader = EvaluationLoader(
            dataset,
            batch_size=_batch_size(config["train"]["eval_batch_size"], config["batch"]["micro_batch_size"]),
            collate_fn=collate_fn(data),
            rank=world.rank,
            world_size=world.world_size,
            options=options,
        )
        self.models = [
            _model(member, own_data, wishes.weights, self.precision, device)
            for member, own_data in zip(members, _train_data(members), strict=True)
        ]
        self.problem = ""

    def _combination(self, wishes: Wishes) -> Combination | None:
        if len(self.members) == 1:
            if wishes.combine is not None:
                raise UserError(
                    f"--combine {wishes.combine.value} needs two models or more, and there is one. Leave it out, or "
                    "name others too."
                )
            return None
        if isinstance(self.task, CoupledTask) and not isinstance(self.task, SumsTask):
            if wishes.combine in (Combination.weights, None):
                return wishes.combine
            raise UserError(
                f"{type(self.task).__name__} compares embeddings, and those of different models can't be combined. "
                "Leave out --combine, and each model is evaluated alone."
            )
        return wishes.combine or Combination.probabilities

    def rows(self, class_dim: int | None) -> list[EvaluateRow]:
        """Evaluates each model and, unless `problem` says why not, all of them together. All ranks call it."""
        rows = [
            EvaluateRow(name=member.name, update=member.checkpoint.update, metrics=self._metrics(model))
            for member, model in zip(self.members, self.models, strict=True)
        ]
        if self.combine is not None:
            name = f"all {len(self.members)}, {self.combine.value}"
            try:
                if class_dim is None:
                    class_dim = getattr(self.task, "class_dim", None)
                together: nn.Module = (
                    mean_of_weights(self.models)
                    if self.combine is Combination.weights
                    else Ensemble(self.models, combine=self.combine, class_dim=class_dim)
                )
                rows.append(EvaluateRow(name=name, update=None, metrics=self._metrics(together)))
            except NotTogetherError as error:  # it follows from the models' outputs, so it is the same on every rank
                self.problem, self.combine = str(error), None
        self.loader.close()
        return rows

    def _metrics(self, model: nn.Module) -> dict[str, float]:
        found = evaluated(model, self.task, self.loader, device=self.device, autocast=self.precision.autocast)
        return evaluation_metrics(self.task, found)


Schema = TypeVar("Schema")


def _typed(schema: type[Schema], section: dict[str, Any], name: str) -> Schema:
    """Returns a section as its schema's dataclass, without keys that the schema doesn't have.

    Raises:
        UserError: a value is of another type, or impossible.
    """
    known = {entry.name for entry in dataclasses.fields(schema)}  # type: ignore[arg-type]
    given = {key: value for key, value in section.items() if key in known}
    try:
        made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given))
    except OmegaConfBaseException as error:
        key = f"{name}.{error.full_key}" if error.full_key else name
        raise UserError(f"{key}: {str(error).splitlines()[0]}.") from error
    assert isinstance(made, schema)
    return made


def _checked(section: dict[str, Any], group: str) -> dict[str, Any]:
    """Returns a section `task` or `model`, after checking the types of its values if its target has a schema."""
    for schema in SCHEMAS[group].values():
        defaults = {entry.name: entry.default for entry in dataclasses.fields(schema)}
        if defaults["_target_"] == section.get("_target_"):
            _typed(schema, section, group)
    return section


def _batch_size(size: Any, micro_batch_size: Any) -> int:
    if size is None:
        return micro_batch_size if type(micro_batch_size) is int else DEFAULT_MICRO_BATCH_SIZE
    if type(size) is not int or size < 1:
        raise UserError(f"train.eval_batch_size={size} is impossible: it must be a whole number, and at least 1.")
    return size


def _train_data(members: Sequence[Member]) -> list[Any]:
    """Builds each member's training data, which its model may take arguments from. Equal ones are built once."""
    sections = [member.config["data"]["train"] for member in members]
    firsts = [sections.index(section) for section in sections]
    built = {number: targets.build(sections[number], "data.train") for number in dict.fromkeys(firsts)}
    return [built[number] for number in firsts]


def _model(member: Member, train_data: Any, weights: Weights, precision: Precision, device: torch.device) -> nn.Module:
    wrap = (member.config.get("strategy") or {}).get("wrap") or ()
    module = build_model(_checked(member.config["model"], "model"), train_data, wrap)
    module = cast(module.to(device), precision.parameter_dtype)
    load_weights(module, member, weights)
    return module


def _print(rows: Sequence[EvaluateRow], examination: _Examination, wishes: Wishes) -> None:
    samples = examination.loader.num_samples
    table = table_of("model", "update", *rows[0].metrics)
    table.title = f"{samples:,} samples, {wishes.weights.value} weights, {examination.precision.name.value}"
    table.title_justify = "left"
    for row in rows:
        is_all = row.update is None
        cells = ["" if is_all else str(row.update), *(number(row.metrics[name]) for name in rows[0].metrics)]
        table.add_row(Text(printable(row.name), overflow="fold"), *cells, style="bold" if is_all else "")
    print_table(table, 120)
    if wishes.output is not None:
        found = {
            "samples": samples,
            "weights": wishes.weights.value,
            "combine": examination.combine.value if examination.combine else None,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        write_result(wishes.output, json.dumps(found, indent=2) + "\n", "Choose another with --out.")
        console.print(printable(f"written: {wishes.output}"))
    if examination.problem:
        if wishes.combine is not None or wishes.class_dim is not None:
            raise UserError(examination.problem)
        console.print(Text(printable(f"not evaluated together: {examination.problem}")))
