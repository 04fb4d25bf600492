"""Runs that go on from their checkpoints, on as many ranks and on others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import evaluations, metrics, updates, without_measurements
from launching import forked
from safetensors.torch import load_file, load_model

from distaccum.checkpoints.folder import checkpoints_in
from distaccum.models import GPT

UNEQUAL = [
    "data=text",
    "data.max_length=48",
    "data.evaluation._target_=examples.FewTexts",
    "+data.evaluation.num_samples=45",
    "model=gpt",
    "model.width=16",
    "task=language_modeling",
    "batch.global_batch_size=24",
    "schedule=constant",
    "wandb.mode=disabled",
    "train.eval_every=5",
    "train.epochs=null",
    "precision=fp64",
    "checkpoint.every_updates=2",
    "checkpoint.keep_last=100",
]
"""Text of unequal lengths, in float64; long enough that windows are ragged for 3 ranks."""


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def run(ranks: int, run_dir: str, *overrides: str) -> str:
    done = forked(ranks, "-m", "distaccum.train", *UNEQUAL, f"run_dir={run_dir}", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def without_seconds(run_dir: str) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, but for what is measured."""
    return [without_measurements(line) for line in metrics(Path(run_dir))]


def test_a_run_that_moves_from_4_to_2_to_1_to_3_ranks_learns_the_same() -> None:
    averaged = ("train.ema.decay=0.7", "train.swa.first_update=3", "train.swa.every_updates=2")
    run(1, "undisturbed", "train.max_updates=15", "strategy=single", *averaged)
    stages = [
        (4, "strategy=ddp", "batch.micro_batch_size=2"),
        (2, "strategy=fsdp", "strategy.accumulate=sharded", "batch.micro_batch_size=8"),
        (1, "strategy=single", "batch.micro_batch_size=5"),
        (4, "strategy=fsdp", "strategy.accumulate=node", "strategy.shard_size=2", "batch.micro_batch_size=3"),
        (3, "strategy=ddp", "strategy.shard_optimizer=true"),
    ]
    for number, (ranks, *overrides) in enumerate(stages, 1):
        said = run(ranks, "moving", f"train.max_updates={3 * number}", *averaged, *overrides)
        assert ("going on from moving/checkpoints/update-" in said) == (number > 1)
    one, other = updates(Path("undisturbed")), updates(Path("moving"))
    assert [line["update"] for line in other] == list(range(1, 16))
    assert [line["micro_steps"] for line in other] == [3] * 3 + [2] * 3 + [5] * 3 + [2] * 3 + [1] * 3
    for key in ("loss", "grad_norm", "weight", "samples", "lr"):
        assert [line[key] for line in other] == pytest.approx([line[key] for line in one], rel=1e-10), key
    found = {line["update"]: line["eval"] for line in evaluations(Path("moving"))}
    for line in evaluations(Path("undisturbed")):
        assert len({line["eval"][key] for key in ("loss", "ema/loss", "swa/loss")}) == 3
        assert found[line["update"]] == pytest.approx(line["eval"], rel=1e-10)
    for name in ("model", "model-ema", "model-swa"):
        weights, wanted = load_file(f"moving/{name}.safetensors"), load_file(f"undisturbed/{name}.safetensors")
        assert weights.keys() == wanted.keys()
        assert all(torch.allclose(weights[key], wanted[key], rtol=1e-9, atol=1e-12) for key in wanted)
    # Negative control: what is compared would show a window that is not the same.
    run(1, "other", "train.max_updates=15", "strategy=single", "seed=1")
    assert [line["loss"] for line in updates(Path("other"))] != pytest.approx([line["loss"] for line in one], rel=1e-2)


@pytest.mark.parametrize(
    "overrides",
    [
        ("strategy=ddp", "strategy.shard_optimizer=true", "data.num_workers=2"),
        ("strategy=ddp", "strategy.compression=powersgd", "strategy.powersgd_start_update=2"),
        ("strategy=ddp", "strategy.static_graph=true"),
        ("strategy=fsdp", "strategy.accumulate=node", "strategy.shard_size=2", "precision=bf16"),
    ],
    ids=["zero-1", "powersgd", "static graph", "fsdp"],
)
def test_on_as_many_ranks_a_run_goes_on_bit_for_bit(overrides: tuple[str, ...]) -> None:
    """Four ranks, whose gradients are added up in an order that depends on where they lie in DDP's buckets."""
    averaged = ("train.ema.decay=0.7", "train.swa.first_update=2")
    more = ("precision=fp32", "model.dropout=0.2", "train.max_updates=7", *averaged, *overrides)
    run(4, "undisturbed", *more)
    shutil.copytree("undisturbed", "cut")
    for folder in checkpoints_in(Path("cut/checkpoints")):
        if folder.name > "update-00000004":
            shutil.rmtree(folder)
    with Path("cut/metrics.jsonl").open("a") as file:
        file.write('{"update": 8, "los')  # as a killed run leaves it
    run(4, "cut", *more)
    assert without_seconds("cut") == without_seconds("undisturbed")
    for name in ("model", "model-ema", "model-swa"):
        assert Path(f"cut/{name}.safetensors").read_bytes() == Path(f"undisturbed/{name}.safetensors").read_bytes()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_averages_of_statistics_go_on_bit_for_bit(strategy: str) -> None:
    """Each rank has averages of its own statistics until an evaluation; a checkpoint between two keeps rank 0's."""
    averaged = ("train.ema.decay=0.7", "train.swa.first_update=2")
    more = ["model=custom", "model._target_=examples.Normalized", "train.epochs=null", "train.max_updates=7"]
    more += ["checkpoint.every_updates=2", "checkpoint.keep_last=9", "train.eval_every=3", "wandb.mode=disabled"]
    for folder in ("undisturbed", "cut"):
        done = forked(2, "-m", "distaccum.train", *more, *averaged, f"strategy={strategy}", f"run_dir={folder}")
        assert done.returncode == 0, done.stdout + done.stderr
        if folder == "undisturbed":
            shutil.copytree("undisturbed", "cut")
            for checkpoint in checkpoints_in(Path("cut/checkpoints")):
                if checkpoint.name > "update-00000004":
                    shutil.rmtree(checkpoint)
    assert without_seconds("cut") == without_seconds("undisturbed")
    for name in ("model", "model-ema", "model-swa"):
        assert Path(f"cut/{name}.safetensors").read_bytes() == Path(f"undisturbed/{name}.safetensors").read_bytes()


def test_the_model_of_a_sharded_run_loads_into_a_plain_module() -> None:
    run(2, "run", "strategy=fsdp", "train.max_updates=2", "precision=fp32")
    stored = load_file("run/model.safetensors")
    model = GPT(vocab_size=len(stored["token_embedding.weight"]), max_length=48, width=16, num_layers=2)
    load_model(model, "run/model.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in model.named_parameters())
