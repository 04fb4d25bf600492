"""`model.unfreeze` on several ranks: the updates, and runs that go on before, at and after one that unfreezes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from command_line import metrics, updates, without_measurements
from launching import assert_passed, cases, forked
from safetensors.torch import load_file

from distaccum.checkpoints.folder import checkpoints_in

TINY = [
    "data=synthetic",
    "data.input_shape=[6]",
    "data.num_samples=50",
    "model=mlp",
    "model.hidden_sizes=[16,8]",
    "batch.global_batch_size=16",
    "batch.micro_batch_size=2",
    "optim=momentum",
    "optim.weight_decay=0.01",
    "wandb.mode=disabled",
    "train.epochs=null",
    "train.max_updates=7",
    "train.ema.decay=0.7",
    "train.eval_every=2",
    "checkpoint.every_updates=1",
    "checkpoint.keep_last=100",
]
UNFREEZE = 'model.unfreeze={3:[layers.4.*],5:["layers.[14].*"]}'


@cases("checks_unfreezing")
def test_unfreezing(module: str, world_size: int, check: str) -> None:
    assert_passed(module, world_size, check)


def run(ranks: int, run_dir: str, *overrides: str) -> str:
    overrides = overrides if any(entry.startswith("model.unfreeze") for entry in overrides) else (UNFREEZE, *overrides)
    done = forked(ranks, "-m", "distaccum.train", *TINY, f"run_dir={run_dir}", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def cut_after(update: int, source: str, run_dir: str) -> None:
    """Copies a run as a kill after an update has left it."""
    shutil.copytree(source, run_dir)
    for folder in checkpoints_in(Path(run_dir, "checkpoints")):
        if folder.name > f"update-{update:08}":
            shutil.rmtree(folder)


def test_a_run_goes_on_bit_for_bit_before_at_and_after_an_unfreezing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Four ranks, whose gradients are added up in an order that depends on where they lie in DDP's buckets."""
    monkeypatch.chdir(tmp_path)
    more = ("model.dropout=0.2", "strategy=ddp", "strategy.shard_optimizer=true", "strategy.bucket_cap_mb=0.0003")
    said = run(4, "undisturbed", *more)
    assert said.count("are unfrozen before update") == 2
    assert "trainable parameters changed" not in said  # torch's warning
    for last in (2, 3):  # right before the first one; after it and before the second
        cut_after(last, "undisturbed", cut := f"cut-{last}")
        run(4, cut, *more)
        found, wanted = ([without_measurements(line) for line in metrics(Path(at))] for at in (cut, "undisturbed"))
        assert found == wanted, last
        for name in ("model.safetensors", "model-ema.safetensors"):
            assert Path(cut, name).read_bytes() == Path("undisturbed", name).read_bytes(), (last, name)


def test_a_run_that_moves_unfreezes_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    run(1, "undisturbed", "strategy=single", "precision=fp64")
    for last, *overrides in ((2, "strategy=fsdp"), (3, "strategy=ddp", "strategy.shard_optimizer=true")):
        cut_after(int(last), "undisturbed", moved := f"moved-{last}")
        run(2, moved, "precision=fp64", *map(str, overrides))
        for key in ("loss", "grad_norm"):
            found, wanted = ([line[key] for line in updates(Path(at))] for at in (moved, "undisturbed"))
            assert found == pytest.approx(wanted, rel=1e-10), (moved, key)
        for name in ("model.safetensors", "model-ema.safetensors"):
            weights, expected = load_file(f"{moved}/{name}"), load_file(f"undisturbed/{name}")
            assert all(torch.allclose(weights[key], expected[key], rtol=1e-10, atol=1e-13) for key in expected), moved
    # Negative control: what is compared would show an unfreezing one update later.
    cut_after(2, "undisturbed", "late")
    said = run(1, "late", "strategy=single", "precision=fp64", 'model.unfreeze={4:[layers.4.*],5:["layers.[14].*"]}')
    assert "changed since: model.unfreeze.3: ['layers.4.*'] → None" in said
    assert updates(Path("late"))[-1]["loss"] != pytest.approx(updates(Path("undisturbed"))[-1]["loss"], rel=1e-4)
