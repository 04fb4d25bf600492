"""What a configuration builds, in runs of somebody's own parts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Ended, evaluations, updates
from torch import Tensor, nn
from torch.utils.data import Dataset

from distaccum import EvaluationLoader, TaskOutput, UserError, evaluate_model
from distaccum.config.compose import compose
from distaccum.config.tools import CheckConfig
from distaccum.tasks import LanguageModeling
from distaccum.tools.check.subject import Subject
from distaccum.training.build import Parts

Train = Callable[..., Ended]
CPU = torch.device("cpu")


class Points(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, dtype: str = "float32") -> None:
        self.inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.inputs[index].sum()


class Tokens(Dataset[tuple[Any, Any]]):
    """As a memory-mapped file has them."""

    vocab_size, max_length = 7, 8

    def __init__(self, dtype: str) -> None:
        self.tokens = np.random.default_rng(0).integers(0, 7, (16, 9)).astype(dtype)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.tokens[index, :-1], self.tokens[index, 1:]


class Rotary(nn.Module):
    """With complex numbers in a buffer and in a parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(4, 4)
        self.register_buffer("angles", torch.polar(torch.ones(2), torch.tensor([0.5, 2.0])))
        self.gain = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))

    def forward(self, inputs: Tensor) -> Tensor:
        pairs = torch.view_as_complex(self.linear(inputs).reshape(-1, 2, 2))
        return (pairs * self.angles * self.gain).real.sum(1)


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LazyLinear(1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs).squeeze(1)


class Modes(nn.Module):
    """As `from_pretrained` gives it (`whole`), or with one part in evaluation mode; `held` stays in it by itself."""

    def __init__(self, whole: bool = True, held: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.held = held
        (self if whole else self.layers[2]).eval()

    def train(self, mode: bool = True) -> Modes:
        super().train(mode)
        if self.held:
            self.layers[1].eval()
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs).sum(1)


class Hungry(nn.Module):
    """Has memory for so many samples."""

    def __init__(self, most: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.most = most

    def forward(self, inputs: Tensor) -> Tensor:
        if len(inputs) > self.most:
            raise torch.OutOfMemoryError(f"out of memory with {len(inputs)} samples")
        return self.layer(inputs).squeeze(1)


class WithSparseBuffers(nn.Module):
    def __init__(self, persistent: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("graph", torch.eye(4).to_sparse(), persistent=persistent)
        with warnings.catch_warnings(action="ignore"):  # of a beta state
            self.register_buffer("rows", torch.eye(4).to_sparse_csr(), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.rows @ (self.graph @ self.linear(inputs).T)).sum(0)


def squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> TaskOutput:
    inputs, targets = batch
    return TaskOutput((model(inputs) - targets).square().sum(), len(inputs))


def squared_task() -> Any:
    return squared


def run(model: str, **more: str) -> list[str]:
    return [
        *("data=custom", f"data.train._target_={__name__}.Points", "wandb.mode=disabled", "device=cpu", "run_dir=run"),
        *(
            "model=custom",
            f"model._target_={__name__}.{model}",
            "task=custom",
            f"task._target_={__name__}.squared_task",
        ),
        *("batch.global_batch_size=8", "batch.micro_batch_size=4", "train.max_updates=2", "schedule=constant"),
        *(f"{key}={value}" for key, value in more.items()),
    ]


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.complex64), ("fp64", torch.complex128)])
def test_complex_tensors_keep_their_imaginary_parts(precision: str, dtype: torch.dtype) -> None:
    config = compose(run("Rotary", precision=precision), "check")
    assert isinstance(config, CheckConfig)
    parts = Parts(config, CPU)
    copy = Subject(config, parts, CPU).fresh_model()
    for module, kind in ((parts.module, dtype), (copy, torch.complex128)):
        for name in ("angles", "gain"):
            found = getattr(module, name)
            assert found.dtype == kind
            assert torch.equal(found.detach().to(torch.complex64), getattr(Rotary(), name))


@pytest.mark.parametrize("size", [16, 4])
def test_a_model_with_complex_tensors_trains_as_in_a_plain_loop(train: Train, size: int) -> None:
    """A window of all samples, so their order is of no matter."""
    options = ["batch.global_batch_size=16", f"batch.micro_batch_size={size}", "optim=adam", "optim.lr=0.1"]
    options += ["checkpoint.enabled=false"]  # safetensors has no name for complex numbers here
    assert train(*run("Rotary"), *options, "train.clip_norm=null").status == 0
    model, inputs = Rotary(), Points().inputs
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for line in updates(Path("run")):
        loss = squared(model, (inputs, inputs.sum(1))).loss_sum / 16
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32"])
def test_tokens_of_any_integer_format(train: Train, dtype: str) -> None:
    losses = []
    for kind in (dtype, "int64"):
        own = [f"data.train._target_={__name__}.Tokens", f"+data.train.dtype={kind}", f"run_dir={kind}"]
        small = ["model=gpt", "model.num_layers=1", "model.width=8", "model.num_heads=1", "task=language_modeling"]
        batch = ["batch.global_batch_size=8", "train.max_updates=2", "wandb.mode=disabled", "device=cpu"]
        ended = train("data=custom", *own, *small, *batch)
        assert ended.status == 0, ended.err
        losses.append([line["loss"] for line in updates(Path(kind))])
    assert losses[0] == losses[1]


def test_targets_of_an_unsigned_format_are_not_taken_for_ignored_ones() -> None:
    """As a byte, -100 would be 156."""
    model = nn.Embedding(200, 200)
    tokens = torch.full((1, 3), 156, dtype=torch.uint8)
    assert int(LanguageModeling()(model, (tokens.long(), tokens)).weight) == 3


def test_formats_that_do_not_go_together_are_one_message(train: Train) -> None:
    ended = train(*run("Rotary"), "+data.train.dtype=float64", "checkpoint.enabled=false")
    assert ended.status == 2
    assert "tensors of torch.float64 and the model's parameters are torch.float32" in ended.message
    fp64 = run("Rotary", precision="fp64", run_dir="fp64")
    assert train(*fp64, "+data.train.dtype=float64", "checkpoint.enabled=false").status == 0


def test_a_model_without_shapes_is_refused(train: Train) -> None:
    ended = train(*run("Lazy"))
    assert ended.status == 2
    assert "model: layer.weight has no shape before the first forward" in ended.message


def test_sparse_buffers_don_t_end_a_run(train: Train) -> None:
    ended = train(*run("WithSparseBuffers"))
    assert ended.status == 0, ended.err
    ended = train(*run("WithSparseBuffers", run_dir="saved"), "+model.persistent=true")
    assert "graph of the model is of format sparse_coo, which checkpoints can't hold" in ended.message
    assert "memory: parameters" in Path("run/logs/rank0.log").read_text()


def log_of(run_dir: str = "run") -> str:
    return Path(run_dir, "logs", "rank0.log").read_text()


def test_pretrained_models_train_in_training_mode(train: Train) -> None:
    losses = []
    for keep, seed in (("false", 0), ("true", 0), ("true", 1)):
        run_dir = f"{keep}{seed}"
        ended = train(*run("Modes", run_dir=run_dir), f"train.keep_modes={keep}", f"seed={seed}", "train.max_updates=1")
        assert ended.status == 0, ended.err
        losses.append(updates(Path(run_dir))[0]["loss"])
    assert losses[0] != losses[1], "dropout and BatchNorm are at work"
    said = log_of("false0")
    assert (
        "built in evaluation mode, but trained (see train.keep_modes): the model, layers, layers.0 and 2 more" in said
    )
    assert "trained in evaluation mode" not in said
    kept = log_of("true0")
    assert "trained in evaluation mode, so without dropout and with fixed statistics: the model\n" in kept
    assert "but trained" not in kept


def test_parts_that_stay_in_evaluation_mode_are_named(train: Train) -> None:
    for number, (arguments, said) in enumerate(
        (
            (["+model.whole=false", "train.keep_modes=true"], "layers.2\n"),
            (["+model.whole=false", "+model.held=true"], "layers.1\n"),
        )
    ):
        assert train(*run("Modes", run_dir=str(number)), *arguments, "train.max_updates=1").status == 0
        assert f"with fixed statistics: {said}" in log_of(str(number))


def test_a_micro_batch_of_one_sample_is_not_for_batchnorm(train: Train) -> None:
    ended = train(*run("Modes", **{"batch.global_batch_size": "1", "batch.micro_batch_size": "1"}))
    assert "a micro-batch has one sample, and BatchNorm needs more than one value" in ended.message
    assert "batch.drop_last=true" in ended.message


def test_batchnorm_is_named_where_windows_are_cut(train: Train) -> None:
    assert train(*run("Modes"), "train.max_updates=1").status == 0
    assert "BatchNorm computes with the statistics of each micro-batch" in log_of()
    assert "are cut (layers.1);" in log_of()
    whole = run("Modes", run_dir="whole", **{"batch.micro_batch_size": "8"})
    for arguments in (whole, [*run("Modes", run_dir="held"), "+model.held=true"]):
        assert train(*arguments, "train.max_updates=1").status == 0
    assert not any("BatchNorm computes" in log_of(run_dir) for run_dir in ("whole", "held"))


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        ([], 4),
        (["train.eval_batch_size=7"], 7),
        (["batch.micro_batch_size=null", "batch.accumulation_steps=3"], 3),
        (["batch=by_length", "batch.micro_batch_size=3"], 3),
    ],
)
def test_evaluations_take_as_many_samples_as_micro_batches_do(overrides: list[str], size: int) -> None:
    config = compose([*run("Hungry"), f"+data.evaluation._target_={__name__}.Points", *overrides], "train")
    loader = Parts(config, CPU).evaluation_loader
    assert loader is not None
    assert loader.size(0) == size
    assert sum(map(loader.size, range(len(loader)))) == 16


def test_an_evaluation_goes_on_in_smaller_batches_when_memory_runs_out(train: Train) -> None:
    sizes = {"1": "whole", "13": "halved"}
    found = []
    for size, run_dir in sizes.items():
        own = [f"+data.evaluation._target_={__name__}.Points", f"train.eval_batch_size={size}"]
        ended = train(*run("Hungry", run_dir=run_dir), *own, "batch.micro_batch_size=2", "data.num_workers=1")
        assert ended.status == 0, ended.err
        found.append([line["eval"]["loss"] for line in evaluations(Path(run_dir))])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    said = log_of("halved")
    assert "out of memory in an evaluation: it begins again with batches of 6 samples" in said
    assert "it begins again with batches of 3 samples" in said
    loader = EvaluationLoader(Points(), batch_size=1)
    with pytest.raises(UserError, match=r"with batches of 1: out of memory with 1 samples. Take a smaller model"):
        evaluate_model(Hungry(0), squared, loader, device=CPU)
    together = EvaluationLoader(Points(), batch_size=8, equal_batches=True, rank=0, world_size=2)
    with pytest.raises(UserError, match=r"with batches of 8: .*Set a lower train.eval_batch_size"):
        evaluate_model(Hungry(), squared, together, device=CPU)
