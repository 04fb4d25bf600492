"""`python -m distaccum.evaluate`, on what real runs have saved."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forking
import pytest
import torch
import torch.nn.functional as F
from command_line import TESTS, TINY, Ended, evaluations
from launching import forked
from torch import Tensor, nn

from distaccum import TaskOutput, evaluate
from distaccum.checkpoints.folder import MANIFEST, checkpoints_in, write_manifest

Evaluate = Callable[..., Ended]
DIGITS = [
    "train.epochs=2",
    "wandb.mode=disabled",
    "precision=fp64",
    "train.ema.decay=0.8",
    "checkpoint.keep_best=1",
    "model.channels=[8,8]",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on digits: two seeds in one process, one under FSDP on two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    for name, ranks, *overrides in (("a", 1, "seed=1"), ("b", 1, "seed=2"), ("sharded", 2, "strategy=fsdp")):
        arguments = [*DIGITS, *overrides, f"run_dir={folder / name}"]
        done = forked(ranks, "-m", "distaccum.train", *arguments)  # type: ignore[arg-type]
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def evaluated(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: Any) -> Ended:
        capfd.readouterr()
        status = 0
        try:
            evaluate.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = int(stop.code or 0)
        return Ended(status, *capfd.readouterr())

    return run


def rows_of(path: str = "out.json") -> dict[str, dict[str, float]]:
    return {row["name"]: row["metrics"] for row in json.loads(Path(path).read_text())["rows"]}


def test_one_run_repeats_what_its_training_said(runs: Path, evaluated: Evaluate) -> None:
    said = evaluations(runs / "a")[-1]["eval"]
    assert evaluated(runs / "a", "--out", "out.json").status == 0
    (found,) = rows_of().values()
    assert found == {name: said[name] for name in ("loss", "accuracy")}
    assert evaluated(runs / "a", "--weights", "ema", "--out", "out.json").status == 0
    (found,) = rows_of().values()
    assert found == {name: said[f"ema/{name}"] for name in ("loss", "accuracy")}
    assert said["loss"] != said["ema/loss"]


def test_an_ensemble_is_better_than_its_members_on_average(runs: Path, evaluated: Evaluate) -> None:
    """The logarithm is concave: the loss of averaged probabilities can't be above the mean of the losses."""
    ended = evaluated(runs / "a", runs / "b", runs / "sharded", "--out", "out.json")
    assert ended.status == 0, ended.err
    assert "all 3, probabilities" in ended.out
    *members, together = rows_of().values()
    assert len(members) == 3
    assert together["loss"] < sum(member["loss"] for member in members) / 3
    assert len({member["loss"] for member in members}) == 3
    assert members[2]["loss"] == pytest.approx(evaluations(runs / "sharded")[-1]["eval"]["loss"], rel=1e-12)


def test_ranks_share_the_data(runs: Path, evaluated: Evaluate, tmp_path: Path) -> None:
    for more in (("--combine", "weights"), ("--combine", "outputs"), ()):
        assert evaluated(runs / "a", runs / "sharded", "--out", "out.json", *more).status == 0
        arguments = [str(runs / "a"), str(runs / "sharded"), "--out", str(tmp_path / "ranks.json"), *more]
        done = forked(2, "-m", "distaccum.evaluate", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("samples, raw weights") == 1, "rank 0 alone speaks"
        alone, shared = rows_of(), rows_of("ranks.json")
        assert alone.keys() == shared.keys()
        for name, metrics in alone.items():
            assert shared[name] == pytest.approx(metrics, rel=1e-12)


def test_which_of_a_run_s_checkpoints(runs: Path, evaluated: Evaluate) -> None:
    updates = [int(path.name.removeprefix("update-")) for path in checkpoints_in(runs / "b" / "checkpoints")]
    for which, wanted in (("newest", [max(updates)]), ("all", sorted(updates))):
        assert evaluated(runs / "b", "--which", which, "--out", "out.json").status == 0
        rows = json.loads(Path("out.json").read_text())["rows"]
        assert [row["update"] for row in rows if row["update"]] == wanted
    assert len(updates) > 1
    assert evaluated(runs / "b", "--which", "best", "--out", "out.json").status == 0
    (found,) = rows_of().values()
    assert found["loss"] == min(line["eval"]["loss"] for line in evaluations(runs / "b"))
    one = checkpoints_in(runs / "b" / "checkpoints")[-1]
    assert evaluated(one, "--out", "out.json").status == 0
    assert [row["update"] for row in json.loads(Path("out.json").read_text())["rows"]] == [min(updates)]


def test_other_data_and_formats(runs: Path, evaluated: Evaluate) -> None:
    assert evaluated(runs / "a", "data.evaluation.split=train", "precision.name=fp32", "--out", "out.json").status == 0
    found = json.loads(Path("out.json").read_text())
    assert found["samples"] == 1433
    # Wherever it stands among the options.
    assert evaluated("--which", "all", runs / "a", "--combine", "weights", "data.evaluation.split=train").status == 0


def test_what_is_wrong_is_said_in_one_message(
    runs: Path, evaluated: Evaluate, tmp_path: Path, train: Callable[..., Ended]
) -> None:
    assert train(*TINY, "run_dir=other").status == 0
    damaged = tmp_path / "damaged"
    shutil.copytree(runs / "a" / "checkpoints" / checkpoints_in(runs / "a" / "checkpoints")[0].name, damaged)
    weights = next(damaged.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-9] + b"something")
    cases: list[tuple[list[Any], str]] = [
        (["nowhere"], "nowhere: there is no checkpoint to evaluate: there is no such folder"),
        (["x" * 300], f"{'x' * 300}: there is no checkpoint to evaluate: there is no such folder"),
        ([tmp_path], "manifest.json is missing"),
        ([damaged], "is not as it was written: its hash is another"),
        ([runs / "a", "other"], "not made for the same data or task"),
        (["other", "sead=1"], "there is no key sead in the training's configuration"),
        ([runs / "a", "model.channels=[4]"], "model.channels can't be changed for an evaluation"),
        ([runs / "a", "model.init_from=x"], "holds all weights of the model. Leave it out"),
        (["other", "model=cnn"], "model can't be changed for an evaluation"),
        ([runs / "a", "data.evaluation.splt=train"], "unexpected keyword argument 'splt'"),
        ([runs / "a", "--weights", "swa"], "has no swa weights"),
        (["other", "--which", "best"], "has no best checkpoint"),
        ([runs / "a", "--combine", "outputs"], "--combine outputs needs two models or more, and there is one"),
        ([runs / "a", "--combine", "everything"], "invalid choice: 'everything'"),
        ([runs / "a", "precision=bf16"], "precision is a section. Give its keys one by one, as in precision.name=…"),
        ([runs / "a", "precision.name=foo"], "precision.name=foo is unknown"),
        ([runs / "a", "data=digits"], "data is a section"),
        ([runs / "a", "train.eval_batch_size=0"], "train.eval_batch_size=0 is impossible"),
        ([runs / "a", "train.eval_batch_size=abc"], "train.eval_batch_size=abc is impossible"),
        ([runs / "a", "data.num_workers=abc"], "data.num_workers=abc is impossible: it takes a whole number or auto"),
        ([runs / "a", "data.pin_memory=maybe"], "data.pin_memory: Value 'maybe'"),
        ([runs / "a", "task.label_smoothing=abc"], "task.label_smoothing: Value 'abc'"),
        ([runs / "a", runs / "b", "--class-dim", "7"], "class_dim=7 is no dimension of outputs of shape"),
        (["seed=1"], "there is no PATH"),
        ([runs / "a", "data.evaluation=null"], "without evaluation data (data.evaluation=null): name some"),
        ([runs / "a", "--out", tmp_path / "no" / "folder.json"], "folder.json can't be written"),
    ]
    for arguments, said in cases:
        ended = evaluated(*arguments)
        assert ended.status == 2, arguments
        assert said in " ".join(ended.err.split()), (arguments, ended.err)
        assert "Traceback" not in ended.err
        assert ended.err.count("error:") == 1


class Secretive(torch.utils.data.TensorDataset):
    """Needs a key, as a dataset behind a login does."""

    num_classes = 2
    input_shape = (3,)

    def __init__(self, api_key: str) -> None:
        assert api_key == "sesame-sesame"
        super().__init__(torch.randn(16, 3), torch.arange(16) % 2)


def test_a_secret_is_to_be_given_again(train: Callable[..., Ended], evaluated: Evaluate) -> None:
    data = ["data=custom"]
    for part in ("train", "evaluation"):
        data += [f"{'+' * (part == 'evaluation')}data.{part}._target_=test_evaluate.Secretive"]
        data += [f"+data.{part}.api_key=sesame-sesame"]
    kept = [override for override in TINY if not override.startswith("data")]
    ended = train(*kept, *data, "run_dir=secret")
    assert ended.status == 0, ended.err
    ended = evaluated("secret")
    assert ended.status == 2
    assert "data.train.api_key is a secret, which is not in the checkpoint: give it again" in ended.err
    again = [f"data.{part}.api_key=sesame-sesame" for part in ("train", "evaluation")]
    assert evaluated("secret", *again, "--trust", "test_evaluate").status == 0


# Checkpoints from strangers

CALL = {"_target_": "os.mkdir", "path": "PWNED"}
WANTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "training data": ("data.train", CALL, "data.train._target_=os.mkdir is named by the checkpoint"),
    "evaluation data": ("data.evaluation", CALL, "data.evaluation._target_=os.mkdir is named by"),
    "the task": ("task", CALL, "task._target_=os.mkdir is named by"),
    "collating": ("data.collate_fn", CALL, "data.collate_fn._target_=os.mkdir is named by"),
    "the model": ("model", CALL, "model._target_=os.mkdir is named by"),
    "an argument's part": (
        "model",
        {"_target_": "distaccum.models.CNN", "channels": [{"deep": CALL}]},
        "model.channels.0.deep._target_=os.mkdir is named by",
    ),
    "a module of one of ours": (
        "data.train",
        {**CALL, "_target_": "distaccum.data.images.image_folder.os.mkdir"},
        "data.train._target_=distaccum.data.images.image_folder.os.mkdir is named by",
    ),
    "what builds": (
        "data.train",
        {
            "_target_": "distaccum.config.instantiate.build",
            "section": {"_target_": "distaccum.data.Digits"},
            "where": "x",
        },
        "data.train._target_=distaccum.config.instantiate.build is named by",
    ),
    "what is inherited": (
        "model",
        {"_target_": "distaccum.models.CNN.apply"},
        "model._target_=distaccum.models.CNN.apply is named by",
    ),
    "a module that acts when it is imported": (
        "data.train",
        {"_target_": "acting.Data"},
        "say so: --trust acting.Data, or --trust acting for all of that package",
    ),
    "the environment": (
        "data.evaluation",
        {"_target_": "distaccum.data.ImageFolder", "root": "${oc.env:HOME}"},
        "data.evaluation.root=${oc.env:HOME} in the checkpoint is no value that a run has saved",
    ),
    "no text": ("data.train", {"_target_": ["os.mkdir"]}, "data.train must name a class or function by _target_"),
    "no model": ("model", {"_target_": "distaccum.models.CNN", "channels": "x"}, "model.channels: "),
    "no section": ("task", 5, "its configuration is not as a run saves it: config.task"),  # type: ignore[dict-item]
}


def crafted(source: Path, target: Path, key: str, value: Any) -> Path:
    """A copy of a run's newest checkpoint whose configuration says something else, with the right hash."""
    newest = checkpoints_in(source / "checkpoints")[0]
    shutil.copytree(newest, target / newest.name)
    content = json.loads((target / newest.name / MANIFEST).read_text())["content"]
    section = content["state"]["progress"]["config"]
    *path, name = key.split(".")
    for part in path:
        section = section[part]
    section[name] = value
    (target / newest.name / MANIFEST).unlink()
    write_manifest(target / newest.name, content)
    return target / newest.name


def test_what_a_checkpoint_wants_to_be_called_is_not(
    runs: Path, evaluated: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("acting.py").write_text("import os\nos.mkdir('PWNED')\nfrom distaccum.data import Digits as Data\n")
    monkeypatch.syspath_prepend(tmp_path)
    for number, (key, value, said) in enumerate(WANTED.values()):
        ended = evaluated(crafted(runs / "a", tmp_path / str(number), key, value))
        assert ended.status == 2, (key, value)
        assert said in " ".join(ended.err.split()), (said, ended.err)
        assert "Traceback" not in ended.err
        assert not Path("PWNED").exists(), (key, value)


def test_what_is_trusted_is_called(
    runs: Path, evaluated: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the tests above would see it."""
    project = "import os\nfrom distaccum.data import Digits\nclass Data(Digits):\n    pass\nos.makedirs('CALLED')\n"
    Path("mine.py").write_text(project)
    monkeypatch.syspath_prepend(tmp_path)
    own = crafted(runs / "a", tmp_path / "own", "data.evaluation", {"_target_": "mine.Data", "split": "evaluation"})
    assert evaluated(own).status == 2
    assert not Path("CALLED").exists()
    for allowed in (("--trust", "mine"), ("--trust", "mine.Data"), ("data.evaluation._target_=mine.Data",)):
        ended = evaluated(own, *allowed)
        assert ended.status == 0, ended.err
    assert Path("CALLED").exists()
    alias = crafted(runs / "a", tmp_path / "alias", "data.train", {**CALL, "_target_": "mine.os.mkdir"})
    ended = evaluated(alias, "--trust", "mine")
    assert ended.status == 2
    assert "data.train._target_=mine.os.mkdir is named by the checkpoint alone" in ended.err
    assert evaluated(alias, "--trust", "mine.os.mkdir").status == 2  # a folder is no dataset
    assert Path("PWNED").exists()


def test_embeddings_are_not_combined(train: Callable[..., Ended], evaluated: Evaluate) -> None:
    small = ["experiment=contrastive", "train.max_updates=1", "train.epochs=null", "wandb.mode=disabled"]
    small += ["schedule.warmup_updates=0", "insight.noise_scale=false"]
    for seed in (1, 2):
        assert train(*small, f"seed={seed}", f"run_dir=views{seed}", "batch.micro_batch_size=32").status == 0
    ended = evaluated("views1", "views2")
    assert ended.status == 0, ended.err
    assert "all 2" not in ended.out
    ended = evaluated("views1", "views2", "--combine", "probabilities")
    assert ended.status == 2
    assert "can't be combined" in ended.err
    for how in ("weights", "probabilities"):
        ended = evaluated("views1", "--combine", how)
        assert ended.status == 2
        assert f"--combine {how} needs two models or more, and there is one" in ended.err


def test_models_of_a_loss_of_sums_are_combined(train: Callable[..., Ended], evaluated: Evaluate) -> None:
    """Its evaluation looks at all samples together, and still there is an ensemble of outputs."""
    small = ["experiment=segmentation", "task=dice", "model.channels=[8]", "data.patch_size=16", "wandb.mode=disabled"]
    small += ["train.max_updates=2", "train.epochs=null", "schedule.warmup_updates=0"]
    for seed in (1, 2):
        assert train(*small, f"seed={seed}", f"run_dir=run{seed}").status == 0
    ended = evaluated("run1", "run2", "--out", "out.json")
    assert ended.status == 0, ended.err
    one, other, together = (row["loss"] for row in rows_of().values())
    assert min(one, other) < together < max(one, other)


@dataclass
class Output:
    """What models of other libraries give."""

    loss: Tensor
    logits: Tensor


class GivesAnOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 10)

    def forward(self, x: Tensor, y: Tensor) -> Output:
        logits = self.layer(x)
        return Output(F.cross_entropy(logits, y), logits)


class OfLogits:
    class_dim = 1

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        x, y = batch
        return TaskOutput(F.cross_entropy(model(x, y).logits, y, reduction="sum"), len(y))


class OfTheirLoss(OfLogits):
    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        return TaskOutput(model(*batch).loss * len(batch[1]), len(batch[1]))


class OfUnknownDimension(OfLogits):
    class_dim = None  # type: ignore[assignment]


def test_outputs_with_names(train: Callable[..., Ended], evaluated: Evaluate) -> None:
    """Put together by their logits where a task takes those; and otherwise each alone, with the reason."""
    tiny = [override for override in TINY if not override.startswith("model")]
    own = ["model=custom", "model._target_=test_evaluate.GivesAnOutput", "task=custom", "precision=fp64"]
    for seed in (1, 2):
        named = "task._target_=test_evaluate.OfLogits"
        assert train(*tiny, *own, named, f"seed={seed}", f"run_dir=run{seed}").status == 0
    trust = ["--trust", "test_evaluate"]
    ended = evaluated("run1", "run2", *trust, "--out", "out.json")
    assert ended.status == 0, ended.err
    one, other, together = (row["loss"] for row in rows_of().values())
    assert together < (one + other) / 2
    assert json.loads(Path("out.json").read_text())["combine"] == "probabilities"
    for task, reason in (("OfTheirLoss", "'loss' is asked for"), ("OfUnknownDimension", "dimension of the classes")):
        other_task = f"task._target_=test_evaluate.{task}"
        ended = evaluated("run1", "run2", *trust, other_task, "--out", "out.json")
        assert ended.status == 0, ended.err
        assert "not evaluated together: " in ended.out + ended.err
        assert reason in " ".join((ended.out + ended.err).split())
        assert [row["loss"] for row in rows_of().values()] == pytest.approx([one, other])
        assert json.loads(Path("out.json").read_text())["combine"] is None
        ended = evaluated("run1", "run2", *trust, other_task, "--combine", "probabilities")
        assert ended.status == 2
        assert reason in " ".join(ended.message.split())
        assert ended.out.count("run") >= 2, "each alone is there before it"


def test_an_average_that_has_not_begun_is_not_evaluated(evaluated: Evaluate, train: Callable[..., Ended]) -> None:
    saving = ["checkpoint.every_updates=1", "checkpoint.async_save=false", "checkpoint.keep_last=9"]
    ended = train(
        *TINY, *saving, "train.swa.first_update=3", "train.max_updates=4", "train.epochs=null", "run_dir=late"
    )
    assert ended.status == 0, ended.err
    assert evaluated("late", "--weights", "swa").status == 0
    early = evaluated("late", "--weights", "swa", "--which", "all")
    assert early.status == 2
    assert "has no swa weights: the average begins later than update" in early.err


def test_a_table_that_cannot_be_printed_is_told(runs: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [forking.python(), "-m", "distaccum.evaluate", str(runs / "a")],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            cwd=TESTS.parent,
        )
    assert (done.returncode, done.stderr) == (2, "error: standard output can't be written: No space left on device.\n")
