from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distaccum.config import (
    BatchConfig,
    ByLengthBatchConfig,
    DataConfig,
    DDPConfig,
    DecayScheduleConfig,
    DPConfig,
    EarlyStoppingConfig,
    Fp16Config,
    LoopConfig,
    PrecisionConfig,
    ScheduleConfig,
    SingleConfig,
    StepScheduleConfig,
    TrainConfig,
    conf_dir,
)
from distaccum.config import instantiate as targets
from distaccum.config.compose import compose
from distaccum.config.enums import PrecisionName
from distaccum.config.optimizers import AdamConfig
from distaccum.config.schemas import SCHEMAS
from distaccum.errors import UserError
from distaccum.tasks import Task
from distaccum.training.model import build_model

FILES = sorted(path for group in SCHEMAS for path in conf_dir().glob(f"{group}/*.yaml"))
EXPERIMENTS = sorted(conf_dir().glob("experiment/*.yaml"))

NEEDED = {
    "data=image_folder": ["data.root=images"],
    "data=jsonl": ["data.files=a.jsonl"],
    "data=parquet": ["data.files=a.parquet"],
    "data=webdataset": ["data.shards=a.tar"],
    "data=hf_dataset": ["data.name=folder"],
    "data=tokens": ["data.files=train.bin"],
    "data=mix": ["data.mix={a: 1}"],
    "data=language": ["data.files=chat.jsonl", "data.tokenizer=folder"],
    "model=causal_lm": ["model.name_or_path=folder"],
    "experiment=finetune": ["data.files=chat.jsonl", "model.name_or_path=folder"],
    "data=custom": ["data.train._target_=mine.Data"],
    "model=timm": ["model.name=resnet18"],
    "experiment=vision": ["data.root=images", "model.name=resnet18"],
    "model=custom": ["model._target_=mine.Model"],
    "task=custom": ["task._target_=mine.Task"],
    "optim=custom": ["optim._target_=mine.Optimizer", "optim.lr=0.1"],
    "schedule=custom": ["schedule._target_=mine.schedule"],
    "optim=rprop": ["schedule=constant"],
    "optim=schedule_free": ["schedule=constant"],
    "optim=schedule_free_sgd": ["schedule=constant"],
}
"""What an option asks to be given."""


def _composed(group: str, option: str) -> Any:
    choice = f"{group}={option}"
    return getattr(compose([choice, *NEEDED.get(choice, [])]), group)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_every_option_composes_to_its_schema(path: Path) -> None:
    group, option = path.parent.name, path.stem
    section = _composed(group, option)
    named = re.search(rf"- /schema/{group}@_here_: (\w+)", path.read_text())
    if named:
        assert type(section) is SCHEMAS[group][named[1]]
    else:
        assert option == "custom"
        assert section["_target_"].startswith("mine.")


def test_every_schema_belongs_to_an_option() -> None:
    used = {match for path in FILES for match in re.findall(r"- /schema/(\w+)@_here_: (\w+)", path.read_text())}
    assert used == {(group, name) for group, schemas in SCHEMAS.items() for name in schemas}


def test_every_group_has_a_schema() -> None:
    groups = re.findall(r"^  - (\w+): ", (conf_dir() / "train.yaml").read_text(), re.MULTILINE)
    assert sorted(groups) == sorted([*SCHEMAS, "experiment", "observers"])  # observers may be any component


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_composes(path: Path) -> None:
    option = f"experiment={path.stem}"
    assert isinstance(compose([option, *NEEDED.get(option, [])]), TrainConfig)


def test_an_experiment_gives_way_to_the_command_line() -> None:
    config = compose(["experiment=text", "batch.micro_batch_size=4", "model=mlp"])
    assert (config.batch.global_batch_size, config.batch.micro_batch_size) == (64, 4)
    assert config.model._target_ == "distaccum.models.MLP"
    assert config.data.train["_target_"] == "distaccum.data.DocumentationText"


def test_an_option_may_follow_another_groups() -> None:
    given = [
        "data=custom",
        "data.train._target_=somewhere.Data",
        "task=classification",
        "model._target_=somewhere.Model",
    ]
    assert compose([*given, "model=${data}"]) == compose([*given, "model=custom"])
    with pytest.raises(UserError, match=r"\$\{nowhere\} can't choose an option of a group"):
        compose(["data=${nowhere}"])


def test_a_name_is_one_of_its_enum() -> None:
    assert compose(["precision=bf16"]).precision.name is PrecisionName.bf16


@pytest.mark.parametrize(
    ("group", "option"),
    [(group, path.stem) for group in ("model", "task", "optim") for path in sorted(conf_dir().glob(f"{group}/*.yaml"))],
)
def test_the_classes_that_options_name_are_there(group: str, option: str) -> None:
    if option != "custom":
        assert callable(targets.locate(_composed(group, option)._target_, group))


@pytest.mark.parametrize("option", ["mlp", "cnn", "gpt"])
def test_models_take_every_key_of_their_section(option: str) -> None:
    data = SimpleNamespace(input_shape=(1, 8, 8), num_classes=3, vocab_size=5, max_length=7)
    model = build_model(_composed("model", option), data)
    assert type(model).__name__.lower() == option


@pytest.mark.parametrize("option", ["classification", "language_modeling"])
def test_tasks_take_every_key_of_their_section(option: str) -> None:
    assert isinstance(targets.build(_composed("task", option), "task"), Task)


# Checks of single sections


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: BatchConfig(global_batch_size=0),
            "batch.global_batch_size=0 is impossible: it must be at least 1.",
        ),
        (
            lambda: BatchConfig(micro_batch_size=-4),
            "batch.micro_batch_size=-4 is impossible: it must be at least 1.",
        ),
        (
            lambda: BatchConfig(micro_batch_size="largest"),
            "batch.micro_batch_size=largest is impossible: it takes a whole number, auto or null.",
        ),
        (
            lambda: BatchConfig(micro_batch_size="auto", accumulation_steps=4),
            "batch.micro_batch_size=auto decides how many micro-steps there are, and batch.accumulation_steps=4 is "
            "given too: leave one of them out (null).",
        ),
        (
            lambda: BatchConfig(micro_batch_size="auto", global_batch_size=None),
            "batch.micro_batch_size=auto needs the size of a window: set batch.global_batch_size.",
        ),
        (
            lambda: ByLengthBatchConfig(micro_batch_size="auto", max_tokens=512),
            "batch.micro_batch_size=auto finds how many tokens fit, and batch.max_tokens=512 is given too: leave one "
            "of them out.",
        ),
        (
            lambda: BatchConfig(auto_memory=1.5),
            "batch.auto_memory=1.5 is impossible: it must be above 0 and at most 1.",
        ),
        (
            lambda: BatchConfig(accumulation_steps=0),
            "batch.accumulation_steps=0 is impossible: it must be at least 1.",
        ),
        (lambda: DataConfig(num_workers=-1), "data.num_workers=-1 is impossible: it must be at least 0."),
        (
            lambda: DataConfig(num_workers=2, prefetch_factor=0),
            "data.prefetch_factor=0 is impossible: it must be at least 1.",
        ),
        (
            lambda: DataConfig(prefetch_factor=4),
            "data.prefetch_factor=4 needs worker processes, and data.num_workers is 0: set data.num_workers, or leave "
            "data.prefetch_factor out.",
        ),
        (
            lambda: DataConfig(persistent_workers=True),
            "data.persistent_workers=True needs worker processes, and data.num_workers is 0: set data.num_workers, or "
            "leave data.persistent_workers out.",
        ),
        (lambda: Fp16Config(init_scale=0), "precision.init_scale=0 is impossible: it must be greater than 0."),
        (
            lambda: Fp16Config(growth_interval=0),
            "precision.growth_interval=0 is impossible: it must be greater than 0.",
        ),
        (lambda: DDPConfig(bucket_cap_mb=0), "strategy.bucket_cap_mb=0 is impossible: it must be greater than 0."),
        (lambda: DDPConfig(powersgd_rank=0), "strategy.powersgd_rank=0 is impossible: it must be at least 1."),
        (
            lambda: DDPConfig(powersgd_start_update=1),
            "strategy.powersgd_start_update=1 is impossible: it must be at least 2.",
        ),
        (lambda: DPConfig(replicas=0), "strategy.replicas=0 is impossible: it must be at least 1."),
        (
            lambda: ScheduleConfig(warmup_updates=-1),
            "schedule.warmup_updates=-1 is impossible: it must be at least 0.",
        ),
        (
            lambda: DecayScheduleConfig(name="cosine", warmup_updates=-1),
            "schedule.warmup_updates=-1 is impossible: it must be at least 0.",
        ),
        (
            lambda: DecayScheduleConfig(name="cosine", final_factor=-0.1),
            "schedule.final_factor=-0.1 is impossible: it must be at least 0.",
        ),
        (
            lambda: StepScheduleConfig(warmup_updates=-1),
            "schedule.warmup_updates=-1 is impossible: it must be at least 0.",
        ),
        (
            lambda: StepScheduleConfig(every_updates=0),
            "schedule.every_updates=0 is impossible: it must be at least 1.",
        ),
        (lambda: StepScheduleConfig(factor=0.0), "schedule.factor=0.0 is impossible: it must be greater than 0."),
        (
            lambda: EarlyStoppingConfig(patience=0),
            "train.early_stopping.patience=0 is impossible: it must be at least 1.",
        ),
        (
            lambda: LoopConfig(epochs=None),
            "train.epochs and train.max_updates are both null, so the run would never end: set one of them.",
        ),
        (lambda: LoopConfig(epochs=0), "train.epochs=0 is impossible: it must be at least 1."),
        (lambda: LoopConfig(max_updates=0), "train.max_updates=0 is impossible: it must be at least 1."),
        (lambda: LoopConfig(eval_every=0), "train.eval_every=0 is impossible: it must be at least 1."),
        (lambda: LoopConfig(eval_batch_size=0), "train.eval_batch_size=0 is impossible: it must be at least 1."),
        (lambda: LoopConfig(clip_norm=0.0), "train.clip_norm=0.0 is impossible: it must be greater than 0."),
        (lambda: TrainConfig(seed=-1), "seed=-1 is impossible: it must be at least 0."),
    ],
)
def test_impossible_values_are_refused_by_name(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError) as refused:
        make()
    assert str(refused.value) == message


def test_values_at_the_edge_are_taken() -> None:
    assert BatchConfig(global_batch_size=1, micro_batch_size=1, accumulation_steps=1).global_batch_size == 1
    assert DataConfig(num_workers=1, prefetch_factor=1, persistent_workers=False).prefetch_factor == 1
    assert DDPConfig(powersgd_rank=1, powersgd_start_update=2).powersgd_start_update == 2
    DecayScheduleConfig(name="linear", warmup_updates=0, final_factor=0)
    LoopConfig(epochs=None, max_updates=1, clip_norm=None, eval_every=1)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PrecisionConfig(name=PrecisionName.fp16), r"precision.name=fp16 can't be set.* Set precision=fp16"),
        (lambda: Fp16Config(name=PrecisionName.bf16), "precision.name=bf16 can't be set"),
        (lambda: SingleConfig(name="ddp"), r"strategy.name=ddp can't be set.* Set strategy=ddp"),
        (lambda: DDPConfig(name="fsdp"), "strategy.name=fsdp can't be set"),
        (lambda: ScheduleConfig(name="step"), r"schedule.name=step can't be set.* Set schedule=step"),
        (lambda: DecayScheduleConfig(name="constant"), "schedule.name=constant can't be set"),
        (lambda: AdamConfig(betas=[0.9]), r"optim.betas=\[0.9\] is impossible: it must be two numbers"),
    ],
)
def test_a_section_cannot_become_another_by_its_name(make: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()
