"""Runs whose windows change their size, ended on the way and gone on with on other ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import start, updates
from launching import forked

DIGITS = [
    "data=digits",
    "model=mlp",
    "model.hidden_sizes=[16]",
    "batch.micro_batch_size=8",
    "schedule=constant",
    "precision=fp64",
    "train.epochs=null",
    "data.evaluation=null",
    "wandb.mode=disabled",
]
RAMP = ["batch.schedule=ramp", "batch.ramp_from=8", "batch.ramp_updates=20", "batch.global_batch_size=96"]
NOISE = [
    "batch.schedule=noise",
    "batch.global_batch_size=32",
    "batch.min_size=16",
    "batch.max_size=512",
    "insight.noise_scale=true",
    "insight.every_updates=1",
    "insight.smoothing=0.5",
    "optim=sgd",
    "optim.lr=0.5",
]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def run(ranks: int, run_dir: str, max_updates: int, *overrides: str) -> str:
    strategy = f"strategy={'ddp' if ranks > 1 else 'single'}"
    arguments = [*DIGITS, strategy, f"run_dir={run_dir}", f"train.max_updates={max_updates}", *overrides]
    if ranks == 1:
        ended = start(*arguments)
        assert ended.status == 0, ended.out + ended.err
        return ended.out
    done = forked(ranks, "-m", "distaccum.train", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def column(run_dir: str, key: str) -> list[float]:
    return [line[key] for line in updates(Path(run_dir))]


def test_a_ramp_that_is_gone_on_with_on_other_ranks_is_the_same() -> None:
    ramp = [*RAMP, "batch.lr_rule=sqrt"]
    assert "sizes by schedule: ramp from 8 to 96 over 20 updates" in run(1, "undisturbed", 45, *ramp)
    run(2, "moving", 13, *ramp)
    run(1, "moving", 45, *ramp)
    sizes = column("undisturbed", "window_samples")
    epochs = column("undisturbed", "epoch")
    assert sizes[:20] == [8 + 88 * number // 20 for number in range(20)]
    assert [
        size for size, epoch, after in zip(sizes[20:], epochs[20:], epochs[21:], strict=False) if epoch == after
    ] == [96] * 22
    assert {sum(size for size, epoch in zip(sizes, epochs, strict=True) if epoch == which) for which in (0, 1)} == {
        1433
    }
    assert column("moving", "window_samples") == sizes
    for key in ("loss", "grad_norm", "lr", "samples"):
        assert column("moving", key) == pytest.approx(column("undisturbed", key), rel=1e-10), key
    rates = column("undisturbed", "lr")
    assert rates[0] / rates[-1] == pytest.approx((8 / 96) ** 0.5)


def test_sizes_that_follow_the_noise_scale_are_repeated() -> None:
    run(1, "undisturbed", 60, *NOISE)
    sizes = column("undisturbed", "window_samples")
    grown = [number for number in range(1, len(sizes)) if sizes[number] > max(sizes[:number])]
    assert max(sizes) >= 4 * sizes[0], sizes  # the gradient shrinks, the noise stays
    stop = grown[1] - 2  # the change is decided by now, and not in force
    run(1, "moving", stop, *NOISE)
    run(1, "moving", 60, *NOISE)
    assert column("moving", "window_samples") == sizes
    assert column("moving", "loss") == column("undisturbed", "loss")


def test_chosen_sizes_are_those_of_the_checkpoint_on_other_ranks_too() -> None:
    run(2, "moving", 40, *NOISE)
    on_two = column("moving", "window_samples")
    assert len(set(on_two)) > 1
    said = run(1, "moving", 60, *NOISE)
    assert "going on from" in said
    assert column("moving", "window_samples")[:40] == on_two
    assert min(column("moving", "window_samples")[40:-1]) >= 16
