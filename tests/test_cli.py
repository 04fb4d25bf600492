from __future__ import annotations

import csv
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from command_line import TINY, Ended, evaluations, files_below, updates
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext
from omegaconf import DictConfig

from distaccum.config import (
    EarlyStoppingConfig,
    LoopConfig,
    ScheduleConfig,
    SingleConfig,
    TrainConfig,
    WandbConfig,
    conf_dir,
)
from distaccum.config.compose import compose
from distaccum.errors import UserError

GROUPS = re.findall(r"^  - (\w+): ", (conf_dir() / "train.yaml").read_text(), re.MULTILINE)


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def _choice(group: str) -> str:
    return f"Choose one of: {', '.join(_options(group))}."


def _has(section: str, schema: type) -> str:
    return f"{section} has: {', '.join(entry.name for entry in fields(schema))}."


def _message(*overrides: str) -> str:
    with pytest.raises(UserError) as refused:
        compose(overrides)
    return str(refused.value)


# What the command line shows


@pytest.fixture(scope="module")
def help_text() -> str:
    """Printed by a process that must not have imported torch."""
    code = (
        "import sys; sys.argv = ['train', '--help']; from distaccum.train import main\n"
        "try: main()\nfinally: sys.exit('torch' in sys.modules or 'wandb' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("group", GROUPS)
def test_help_lists_the_options_that_there_are(help_text: str, group: str) -> None:
    listed = re.search(rf"^  {group}=([a-z0-9_|]+)", help_text, re.MULTILINE)
    assert listed, f"{group} is not in --help"
    assert sorted(listed[1].split("|")) == _options(group)


def test_the_values_that_help_shows_compose(help_text: str) -> None:
    """Each KEY=VALUE of the help's own examples, alternatives apart."""
    _, _, examples = help_text.partition("Set values:")
    shown = re.findall(r"(?<![\w+.])([a-z_]+(?:\.[a-z_]+)*=[\w./]+)(?=\s)", examples.partition("Your own")[0])
    assert len(shown) >= 5
    for override in shown:
        compose([override])


def test_cfg_job_prints_the_configuration(train: Callable[..., Ended], tmp_path: Path) -> None:
    ended = train("--cfg", "job", "seed=7", "optim=momentum")
    assert ended.status == 0
    assert "seed: 7" in ended.out
    assert "_target_: torch.optim.SGD" in ended.out
    assert "momentum: 0.9" in ended.out
    assert ended.err == ""
    assert not list(tmp_path.iterdir())


# The default strategy


@pytest.mark.parametrize(
    ("environment", "strategy"),
    [
        ({}, "single"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "single"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "ddp"),
        # Some clusters set the one without having started any ranks.
        ({"WORLD_SIZE": "2"}, "single"),
    ],
)
def test_the_strategy_follows_the_launcher(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], strategy: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert compose().strategy.name == strategy


def test_a_strategy_that_is_given_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert compose(["strategy=single"]).strategy.name == "single"


# Bad input

TRAIN_HAS = _has("train", LoopConfig)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        pytest.param(
            ["train.epoch=3"], f"there is no key train.epoch. Did you mean train.epochs? {TRAIN_HAS}", id="unknown key"
        ),
        pytest.param(
            ["sead=3"],
            f"there is no key sead. Did you mean seed? {_has('The configuration', TrainConfig)}",
            id="unknown key at the top",
        ),
        pytest.param(
            ["train.early_stopping.metrik=loss"],
            "there is no key train.early_stopping.metrik. Did you mean train.early_stopping.metric? "
            + _has("train.early_stopping", EarlyStoppingConfig),
            id="unknown key, nested",
        ),
        pytest.param(
            ["wandb.entity=me"],
            f"there is no key wandb.entity. {_has('wandb', WandbConfig)}",
            id="unknown key unlike any other",
        ),
        pytest.param(
            ["strategy.bucket_cap_mb=3"],
            f"there is no key strategy.bucket_cap_mb. It belongs to strategy=ddp. {_has('strategy', SingleConfig)}",
            id="key of another strategy",
        ),
        pytest.param(
            ["schedule=constant", "schedule.final_factor=0.1"],
            "there is no key schedule.final_factor. It belongs to schedule=cosine or schedule=linear or "
            "schedule=polynomial or schedule=wsd. " + _has("schedule", ScheduleConfig),
            id="key of other options",
        ),
        pytest.param(
            ["model=custom", "model._target_=a.B", "model.width=3"],
            "there is no key model.width. model has: _target_, activation_checkpointing, freeze, init_from, "
            "init_on_meta, unfreeze. To add a key to model, write +model.width=….",
            id="key of an open section",
        ),
        pytest.param(
            ["observers.mine=a.B"],
            "there is no key observers.mine. To add a key to observers, write +observers.mine=….",
            id="key of an empty section",
        ),
        pytest.param(
            ["+train.epoch=3"],
            "there is no key train.epoch: it was added with +, but nothing reads it.",
            id="added key",
        ),
        pytest.param(
            ["+train.early_stopping.typo=3"],
            "there is no key train.early_stopping.typo: it was added with +, but nothing reads it.",
            id="added key, nested",
        ),
        pytest.param(
            ["+typo=3"], "there is no key typo: it was added with +, but nothing reads it.", id="added key at the top"
        ),
        pytest.param(
            ["++optim.typo=3"],
            "there is no key optim.typo: it was added with +, but nothing reads it.",
            id="forced key",
        ),
        pytest.param(
            ["train.epochs=three"],
            "train.epochs=three: Value 'three' of type 'str' could not be converted to Integer.",
            id="wrong type",
        ),
        pytest.param(
            ["train.epochs=4.5"],
            "train.epochs=4.5: Value '4.5' of type 'float' could not be converted to Integer.",
            id="a fraction for a count",
        ),
        pytest.param(
            ["batch.micro_batch_size=4.5"],
            "batch.micro_batch_size=4.5: it takes a whole number, auto or null.",
            id="a fraction for a size",
        ),
        pytest.param(
            ["batch.micro_batch_size=two"],
            "batch.micro_batch_size=two is impossible: it takes a whole number, auto or null.",
            id="a word for a size",
        ),
        pytest.param(
            ["batch.drop_last=maybe"],
            "batch.drop_last=maybe: Value 'maybe' is not a valid bool (type str).",
            id="neither true nor false",
        ),
        pytest.param(
            ["device=tpu"], "device=tpu: Invalid value 'tpu', expected one of [auto, cpu, cuda].", id="not a choice"
        ),
        pytest.param(["optim.lr=null"], "optim.lr=null: it can't be null.", id="null"),
        pytest.param(
            ["optim.betas=3"], "optim.betas=3: it takes a list, as in optim.betas=[…].", id="number for a list"
        ),
        pytest.param(
            ["optim.groups={match: a}"],
            "optim.groups={match: a}: it takes a list, as in optim.groups=[…].",
            id="dictionary for a list",
        ),
        pytest.param(
            ["precision=fp8"],
            f"there is no precision=fp8. {_choice('precision')}",
            id="unknown option",
        ),
        pytest.param(
            ["experiment=txt"], f"there is no experiment=txt. {_choice('experiment')}", id="unknown experiment"
        ),
        pytest.param(
            ["model=null"],
            "model=null names no option. A group is given by the name of one of its options, as in data=digits.",
            id="no option",
        ),
        pytest.param(
            ["+data=digits"], "data is given more than once. Choose one option: data=…, without +.", id="two options"
        ),
        pytest.param(
            ["optim.lr=[1"],
            "optim.lr=[1 can't be read. Write KEY=VALUE; a value with special characters in quotes: 'KEY=\"VALUE\"'.",
            id="syntax error",
        ),
        pytest.param(
            ["optim.lr"],
            "optim.lr can't be read. Write KEY=VALUE; a value with special characters in quotes: 'KEY=\"VALUE\"'.",
            id="no value",
        ),
        pytest.param(["model=custom"], "model._target_ must be given.", id="missing value"),
        pytest.param(["data=image_folder"], "data.root must be given.", id="missing value behind another"),
        pytest.param(["~data"], "data must be given.", id="missing section"),
        pytest.param(["run_dir=${nowhere}"], "run_dir: Interpolation key 'nowhere' not found.", id="interpolation"),
        pytest.param(["seed=-1"], "seed=-1 is impossible: it must be at least 0.", id="a check of the schema"),
    ],
)
def test_bad_input_is_explained(overrides: list[str], message: str) -> None:
    assert _message(*overrides) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(
            "# @package _global_\ntrain:\n  epoch: 3\n",
            f"in experiment/mine.yaml: there is no key train.epoch. Did you mean train.epochs? {TRAIN_HAS}",
            id="unknown key",
        ),
        pytest.param(
            "# @package _global_\ntrain:\n  epochs: three\n",
            "in experiment/mine.yaml: train.epochs: Value 'three' of type 'str' could not be converted to Integer.",
            id="wrong type",
        ),
        pytest.param(
            "train:\n  epochs: 3\n",
            "in experiment/mine.yaml: its first line must be `# @package _global_`, so that its keys are those of the "
            "whole configuration.",
            id="no package line",
        ),
        pytest.param(
            "# @package _global_\ndefaults:\n  - override /model: transformer\n",
            f"there is no model=transformer. {_choice('model')}",
            id="unknown option",
        ),
    ],
)
def test_bad_files_are_explained(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(content)
    assert _message(f"hydra.searchpath=[{tmp_path}]", "experiment=mine") == message


def test_a_file_with_a_syntax_error_is_named(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ntrain: [\n")
    message = _message(f"hydra.searchpath=[{tmp_path}]", "experiment=mine")
    assert message.startswith("a configuration file can't be read: ")
    assert f'"{tmp_path}/experiment/mine.yaml", line 3' in message
    assert "\n" not in message


def test_a_bug_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, train: Callable[..., Ended], tmp_path: Path
) -> None:
    """Errors of the types that Hydra raises while it composes are no bad input once the run has started."""
    monkeypatch.setattr("distaccum.training.run.as_plain", lambda config: int("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        train(*TINY)


# Sweeps


def test_a_sweep_makes_its_runs_one_after_another(train: Callable[..., Ended], tmp_path: Path) -> None:
    ended = train("-m", "seed=1,2", *TINY, "train.max_updates=2")
    assert (ended.status, ended.err) == (0, "")
    runs = sorted(path.parent for path in Path("runs").glob("*/metrics.jsonl"))
    assert len(runs) == 2
    assert [f"seed: {seed}\n" in (run / "config.yaml").read_text() for seed, run in enumerate(runs, 1)] == [True] * 2
    assert [len(updates(run)) for run in runs] == [2, 2]
    assert all((run / "logs" / "rank0.log").read_text() for run in runs), "each run writes its log"
    assert {Path(name).name for name in files_below(tmp_path)} == {
        "config.yaml",
        "metrics.jsonl",
        "run.json",
        "rank0.log",
        "run.lock",
        "model.safetensors",
        "manifest.json",
        "rank-00000.safetensors",
        "multirun.yaml",  # Hydra's own record of the sweep
        "points.csv",
    }
    assert all(name.startswith("runs/") for name in files_below(tmp_path))
    (table,) = Path("runs").glob("*_sweep/points.csv")
    assert f"points         {table}" in ended.out
    with open(table) as file:
        points = list(csv.DictReader(file))
    best = [min(line["eval"]["loss"] for line in evaluations(run)) for run in runs]
    assert [(p["point"], p["metric"], float(p["best"]), p["run_dir"]) for p in points] == [
        (f"seed={seed}", "loss", value, str(run)) for seed, value, run in zip((1, 2), best, runs, strict=True)
    ]


class Picks(Sweeper):
    """A sweeper that maximises over two seeds, as Optuna's plugin would."""

    __module__ = "hydra_plugins.picks"  # Hydra takes none from elsewhere

    def __init__(self, direction: str, **others: Any) -> None:
        assert direction == "maximize"

    def setup(self, *, hydra_context: HydraContext, task_function: Any, config: DictConfig) -> None:
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        jobs = self._launcher.launch([[*arguments, f"seed={seed}"] for seed in (1, 2)], initial_job_idx=0)
        print("picked", max(float(job.return_value) for job in jobs))


@pytest.fixture
def picks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    package, module = ModuleType("hydra_plugins"), ModuleType("hydra_plugins.picks")
    package.__path__ = []
    vars(package)["picks"], vars(module)["Picks"] = module, Picks
    monkeypatch.setitem(sys.modules, "hydra_plugins", package)
    monkeypatch.setitem(sys.modules, "hydra_plugins.picks", module)
    Plugins.instance().register(Picks)
    return ["-m", "hydra.sweeper._target_=hydra_plugins.picks.Picks", "+hydra.sweeper.direction=maximize"]


def test_a_sweeper_that_optimises_gets_the_best_metric(
    train: Callable[..., Ended], picks: list[str], tmp_path: Path
) -> None:
    ended = train(*picks, *TINY, "train.eval_every=1", "checkpoint.best_metric=accuracy")
    assert (ended.status, ended.err) == (0, "")
    runs = sorted(path.parent for path in Path("runs").glob("*/metrics.jsonl"))
    best = [max(line["eval"]["accuracy"] for line in evaluations(run)) for run in runs]
    assert len(best) == 2
    assert f"picked {max(best)}\n" in ended.out


def test_a_sweeper_that_optimises_needs_evaluations_that_have_the_metric(
    train: Callable[..., Ended], picks: list[str], tmp_path: Path
) -> None:
    ended = train(*picks, *TINY, "data.evaluation=null")
    assert ended.message.startswith(
        "the sweeper optimises a metric of the evaluations, and there is no evaluation data"
    )
    assert not list(Path("runs").glob("*/metrics.jsonl"))
    ended = train(*picks, *TINY, "checkpoint.best_metric=iou")
    assert ended.message == (
        "checkpoint.best_metric=iou is unknown: the evaluations have loss, accuracy. Name one of those."
    )


def test_a_sweep_ends_with_its_first_bad_point(train: Callable[..., Ended], tmp_path: Path) -> None:
    ended = train("-m", "seed=-1,2", *TINY)
    assert ended.message == "seed=-1 is impossible: it must be at least 0."
    assert not list(Path("runs").glob("*/metrics.jsonl"))


@pytest.mark.parametrize(
    ("given", "points_before"),
    [("run_dir=same", 0), ("run_dir=same/${train.max_updates}", 1), ("run_dir=same,./same", 1)],
)
def test_points_of_a_sweep_that_share_a_folder_are_refused(
    given: str, points_before: int, train: Callable[..., Ended], tmp_path: Path
) -> None:
    ended = train("-m", "optim.lr=0.1,0.2", given, *TINY)
    assert re.fullmatch(
        r"run_dir=\S+ is one folder for several points of -m, which would go on with each other's run. Give "
        r"each its own, as in 'run_dir=sweep/\$\{optim.lr\}', or leave run_dir out.",
        ended.message,
    )
    assert len(list(tmp_path.rglob("metrics.jsonl"))) == points_before


def test_points_of_a_sweep_with_folders_of_their_own_are_made(train: Callable[..., Ended], tmp_path: Path) -> None:
    assert train("-m", "optim.lr=0.1,0.2", "run_dir=sweep/${optim.lr}", *TINY).status == 0
    assert [len(updates(Path("sweep", lr))) for lr in ("0.1", "0.2")] == [3, 3]


def test_a_sweep_among_ranks_is_refused(
    monkeypatch: pytest.MonkeyPatch, train: Callable[..., Ended], tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", "0")
    assert train("-m", "seed=1,2", *TINY).message == (
        "-m (multirun) under torchrun would make every rank run the whole sweep. Sweep outside: one torchrun for each "
        "point."
    )
    assert not list(Path("runs").glob("*/config.yaml"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["data.num_workers=99999999999999999999999"],
            "data.num_workers=99999999999999999999999 is impos",
        ),
        (["experiment=text", "data.train.max_length=9223372036854775808"], "the model is too large to be built: "),
    ],
)
def test_numbers_beyond_all_machines_are_refused(train: Callable[..., Ended], overrides: list[str], said: str) -> None:
    ended = train("wandb.mode=disabled", *overrides)
    assert ended.status == 2
    assert ended.message.startswith(said)


def test_an_infinite_limit_of_memory_is_refused() -> None:
    with pytest.raises(UserError, match=r"^memory\.limit_gb=inf is impossible: it must be finite\.$"):
        compose(["memory.limit_gb=1e400"], "memory")


def test_a_current_folder_that_is_gone_is_named(
    train: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    ended = train()
    assert ended.status == 2
    assert ended.message == "the current folder no longer exists. Change to another one: cd PATH."
