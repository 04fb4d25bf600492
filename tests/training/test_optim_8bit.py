"""AdamW with moments in 8 bits: `optim=adamw8bit`, by bitsandbytes, which is an extra."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import Ended, evaluations, metrics, updates, without_measurements
from launching import forked
from torch import nn

from distaccum import Accumulator
from distaccum.checkpoints.folder import checkpoints_in
from distaccum.checkpoints.optimizer_state import check_same_state
from distaccum.config.compose import compose
from distaccum.config.optimizers import AdamConfig, AdamW8bitConfig
from distaccum.errors import UserError
from distaccum.runtime.memory import held_bytes
from distaccum.tools.memory.run import examine
from distaccum.training import optim
from distaccum.training.optim import build_optimizer

CPU = torch.device("cpu")
needs_8bit = pytest.mark.skipif(not optim.has_8bit(), reason='needs the extra "adam8bit"')
DIGITS = ["optim=adamw8bit", "wandb.mode=disabled", "model=mlp", "model.hidden_sizes=[128]"]
"""64 × 128 weights: enough of them for 8 bits."""


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))


def _state(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for value in state.values()]


@needs_8bit
def test_its_state_is_a_quarter_and_its_updates_are_close() -> None:
    """The same gradients for both: what a block's largest number leaves of the others is two digits."""
    moved, sizes = [], []
    for config in (AdamConfig(_target_="torch.optim.AdamW", lr=1e-3), AdamW8bitConfig(lr=1e-3)):
        config = dataclasses.replace(config, weight_decay=0.01)
        model = _network()
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        optimizer = build_optimizer(config, model.parameters(), CPU)
        accumulator = Accumulator(model, optimizer, clip_norm=1.0)
        for step in range(10):
            batches = torch.randn(4, 8, 64, generator=torch.Generator().manual_seed(step))
            with accumulator.window(list(batches)) as micro_batches:
                for batch in micro_batches:
                    accumulator.backward(model(batch).square().sum(), len(batch))
            accumulator.step()
        moved.append(nn.utils.parameters_to_vector(model.parameters()).detach() - before)
        sizes.append(held_bytes(_state(optimizer)))
    assert sizes[1] < 0.3 * sizes[0]
    difference = float((moved[1] - moved[0]).norm() / moved[0].norm())
    assert 1e-6 < difference < 0.1


@needs_8bit
def test_it_learns_digits_and_goes_on_bit_for_bit(train: Callable[..., Ended]) -> None:
    more = [*DIGITS, "train.epochs=20", "checkpoint.every_updates=50", "checkpoint.keep_last=9"]
    assert train(*more, "run_dir=undisturbed").status == 0
    assert evaluations(Path("undisturbed"))[-1]["eval"]["accuracy"] > 0.9
    shutil.copytree("undisturbed", "cut")
    for folder in checkpoints_in(Path("cut/checkpoints")):
        if folder.name > "update-00000050":
            shutil.rmtree(folder)
    assert train(*more, "run_dir=cut").status == 0
    found, wanted = ([without_measurements(line) for line in metrics(Path(run))] for run in ("cut", "undisturbed"))
    assert found == wanted
    assert Path("cut/model.safetensors").read_bytes() == Path("undisturbed/model.safetensors").read_bytes()


@needs_8bit
def test_moments_do_not_stay_silently_as_they_were(train: Callable[..., Ended]) -> None:
    more = [*DIGITS, "train.epochs=null", "run_dir=run"]
    assert train(*more, "train.max_updates=2").status == 0
    before = Path("run/model.safetensors").read_bytes()
    for size, said in (
        (0, r"in 32 bits, and with optim_bits=8 and min_8bit_size=0 they would be in 8\."),
        (10**6, "in 8 bits, and"),
    ):
        ended = train(*more, "train.max_updates=4", f"optim.min_8bit_size={size}")
        assert ended.status == 2
        assert re.search(said, ended.message)
    assert Path("run/model.safetensors").read_bytes() == before
    assert train(*more, "train.max_updates=4").status == 0
    assert len(updates(Path("run"))) == 4


@needs_8bit
@pytest.mark.parametrize("optimizer", ["AdamW", "Lion", "AdamW8bit", "PytorchLARS"])
def test_bits_are_each_parameters_own(optimizer: str, train: Callable[..., Ended]) -> None:
    """All of bitsandbytes' optimizers have a `min_8bit_size`; not all of them have moments in 8 bits."""
    more = [*DIGITS[1:], "optim=custom", f"optim._target_=bitsandbytes.optim.{optimizer}", "optim.lr=0.001"]
    more += ["train.epochs=null", "run_dir=run", *(["+optim.momentum=0.9"] if optimizer == "PytorchLARS" else [])]
    assert train(*more, "train.max_updates=2").status == 0
    ended = train(*more, "train.max_updates=4")
    assert ended.status == 0, ended.message
    assert len(updates(Path("run"))) == 4


@needs_8bit
def test_a_parameter_may_be_kept_in_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for table in ("pid2config", "index2config"):  # it knows parameters by their addresses, for ever
        monkeypatch.setattr(manager, table, {})

    def made() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.Linear(64, 128))
        manager.override_config(model[0].weight, "optim_bits", 32)
        return model, bitsandbytes.optim.AdamW8bit(model.parameters(), min_8bit_size=1024)

    model, optimizer = made()
    model(torch.ones(2, 128)).sum().backward()
    optimizer.step()
    names = {parameter: name for name, parameter in model.named_parameters()}
    stored = [f"optimizer/{names[parameter]}/{key}" for parameter, state in optimizer.state.items() for key in state]
    assert sum("absmax1" in path for path in stored) == 1
    check_same_state(*made(), stored)
    manager.pid2config.clear()
    other = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.Linear(64, 128))
    with pytest.raises(UserError, match=r"moments of 0\.weight in 32 bits, and with optim_bits=8"):
        check_same_state(other, bitsandbytes.optim.AdamW8bit(other.parameters(), min_8bit_size=1024), stored)


@needs_8bit
def test_an_embedding_that_asks_for_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for table, empty in (("pid2config", {}), ("index2config", {}), ("module_weight_config_triple", [])):
        monkeypatch.setattr(manager, table, empty)

    def made() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = torch.nn.Sequential(bitsandbytes.nn.StableEmbedding(64, 128), torch.nn.Linear(128, 64))
        return model, bitsandbytes.optim.AdamW8bit(model.parameters(), min_8bit_size=1024)

    model, optimizer = made()
    model(torch.arange(64)).sum().backward()
    optimizer.step()
    names = {parameter: name for name, parameter in model.named_parameters()}
    stored = [f"optimizer/{names[parameter]}/{key}" for parameter, state in optimizer.state.items() for key in state]
    assert [path for path in stored if "absmax1" in path] == ["optimizer/1.weight/absmax1"]
    check_same_state(*made(), stored)


@needs_8bit
def test_ranks_and_shards_make_the_same_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients differ by roundings, which moments in 8 bits may turn into the next code: 1 in about a hundred."""
    monkeypatch.chdir(tmp_path)
    runs = {"alone": (1, ()), "ddp": (2, ()), "zero-1": (2, ("strategy.shard_optimizer=true",))}
    for name, (ranks, overrides) in runs.items():
        more = [*DIGITS, "train.max_updates=12", "train.epochs=null", f"run_dir={name}", *overrides]
        done = forked(ranks, "-m", "distaccum.train", *more)
        assert done.returncode == 0, done.stdout + done.stderr
    losses = {name: [line["loss"] for line in updates(Path(name))] for name in runs}
    for name in ("ddp", "zero-1"):
        assert losses[name] == pytest.approx(losses["alone"], rel=1e-3), name
    assert losses["ddp"] == losses["zero-1"], "sharding moves state to other ranks and changes none of it"
    # From two shards to one process with all of the state.
    more = [*DIGITS, "train.max_updates=14", "train.epochs=null", "run_dir=zero-1", "strategy=single"]
    done = forked(1, "-m", "distaccum.train", *more)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on from zero-1/checkpoints/update-00000012" in done.stdout
    assert len(updates(Path("zero-1"))) == 14


@needs_8bit
def test_what_it_can_not_be_combined_with(train: Callable[..., Ended]) -> None:
    assert (
        "strategy=fsdp does not support optim=adamw8bit"
        in forked(2, "-m", "distaccum.train", *DIGITS, "strategy=fsdp").stderr
    )
    assert train(*DIGITS, "optim.betas=[0.9]").status == 2
    ended = train(*DIGITS, "optim.betas=[0.9,1.5]")
    assert ended.status == 2
    assert "refuses its arguments" in ended.err


def test_without_the_package(train: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "has_8bit", lambda: False)
    ended = train(*DIGITS)
    assert ended.status == 2
    assert 'pip install "distaccum[adam8bit]"' in ended.err


def test_its_row_in_the_table_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["model=mlp", "model.hidden_sizes=[128]", "batch.micro_batch_size=64"]
    if optim.has_8bit():
        report = examine(compose(overrides, "memory"))  # type: ignore[arg-type]
        configured, narrow = report.rows[0], next(row for row in report.rows if row.overrides == "optim=adamw8bit")
        own = examine(compose([*overrides, "optim=adamw8bit"], "memory")).configured  # type: ignore[arg-type]
        assert narrow.footprint.optimizer == own.footprint.optimizer < 0.4 * configured.footprint.optimizer
        assert narrow.peak == own.peak
    monkeypatch.setattr("distaccum.tools.memory.run.has_8bit", lambda: False)
    report = examine(compose(overrides, "memory"))  # type: ignore[arg-type]
    assert not any("adamw8bit" in row.overrides for row in report.rows)
    assert any("pip install" in sentence for sentence in report.words())
    json.loads(report.as_json())
