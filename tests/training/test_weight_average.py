"""Averages of the weights in one process; test_resume_on_ranks.py has those of runs on several ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import TINY, Ended, evaluations, updates
from rebinding import Rebinding
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from distaccum.checkpoints import Checkpointer
from distaccum.config import CheckpointConfig, EmaConfig, SwaConfig
from distaccum.errors import UserError
from distaccum.strategies import SingleStrategy
from distaccum.training import weight_average as averaging
from distaccum.training.weight_average import WeightAverage


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).to(dtype)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def trained(module: nn.Module, average: WeightAverage, updates: int = 7) -> list[dict[str, Tensor]]:
    """The states after each update."""
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    states = []
    for number in range(1, updates + 1):
        optimizer.zero_grad()
        module(torch.randn(8, 3, dtype=next(module.parameters()).dtype)).square().sum().backward()
        optimizer.step()
        average.after_update(number)
        states.append(state(module))
    return states


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=tolerance, atol=tolerance), name


def averaged_state(module: nn.Module, average: WeightAverage) -> dict[str, Tensor]:
    with average.in_the_model():
        return state(module)


def test_ema_is_what_its_formula_says() -> None:
    module = model()
    average = WeightAverage(SingleStrategy(module), EmaConfig(decay=0.8, first_update=2, every_updates=2))
    states = trained(module, average)
    wanted = states[1]
    for later in (states[3], states[5]):
        for name, value in later.items():
            is_number = value.is_floating_point()
            wanted[name] = 0.8 * wanted[name] + 0.2 * value if is_number else states[-1][name]
    assert_close(averaged_state(module, average), wanted)
    assert_close(state(module), states[-1], tolerance=0.0)
    with pytest.raises(AssertionError):  # what is compared tells one average from another
        assert_close(wanted, states[-1])


def test_swa_is_the_plain_mean() -> None:
    module = model()
    average = WeightAverage(SingleStrategy(module), SwaConfig(first_update=4))
    assert not average.has_begun
    states = trained(module, average)
    assert average.has_begun
    wanted = {name: sum(s[name] for s in states[3:]) / 4 for name in states[0]}  # type: ignore[misc]
    wanted["1.num_batches_tracked"] = states[-1]["1.num_batches_tracked"]
    # torch takes 1 / number of weights in float32.
    assert_close(averaged_state(module, average), wanted, tolerance=1e-8)
    with pytest.raises(AssertionError):
        assert_close(wanted, states[-1], tolerance=1e-4)


def test_what_is_used_is_put_back_when_the_evaluation_fails() -> None:
    module = model()
    average = WeightAverage(SingleStrategy(module), EmaConfig(decay=0.9))
    states = trained(module, average)
    before = averaged_state(module, average)
    with pytest.raises(RuntimeError), average.in_the_model():
        raise RuntimeError
    assert_close(state(module), states[-1], tolerance=0.0)
    assert_close(averaged_state(module, average), before, tolerance=0.0)


def test_what_has_changed_places_is_put_back_when_memory_runs_out_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    module = model()
    average = WeightAverage(SingleStrategy(module), EmaConfig(decay=0.9))
    states = trained(module, average)
    before = averaged_state(module, average)
    exchange, calls = averaging._exchange, 0

    def fails_once(own: Tensor, other: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError("injected")
        exchange(own, other)

    monkeypatch.setattr(averaging, "_exchange", fails_once)
    with pytest.raises(torch.OutOfMemoryError), average.in_the_model():
        pass
    assert_close(state(module), states[-1], tolerance=0.0)
    assert_close(averaged_state(module, average), before, tolerance=0.0)


def test_bfloat16_weights_are_averaged_in_float32() -> None:
    """Steps of a thousandth of a weight would be rounded away in bfloat16."""
    module = nn.Linear(2, 1, bias=False).bfloat16()
    average = WeightAverage(SingleStrategy(module), EmaConfig(decay=0.999))
    nn.init.ones_(module.weight)
    average.after_update(1)
    with torch.no_grad():
        module.weight.fill_(2.0)
    for number in range(2, 402):
        average.after_update(number)
    wanted = 2 - 0.999**400
    assert average.tensors()["weight"].tolist()[0] == pytest.approx([wanted] * 2, rel=1e-4)
    with average.in_the_model():
        assert module.weight.tolist()[0] == pytest.approx([wanted] * 2, rel=1e-2)
    assert module.weight.tolist() == [[2.0, 2.0]]
    assert average.tensors()["weight"].tolist()[0] == pytest.approx([wanted] * 2, rel=1e-4)


def test_buffers_that_a_forward_assigns_anew_are_averaged() -> None:
    module = Rebinding()
    average = WeightAverage(SingleStrategy(module), SwaConfig(first_update=1))
    states = trained(module, average, updates=3)
    wanted = {name: sum(s[name] for s in states) / 3 for name in states[0]}  # type: ignore[misc]
    wanted["calls"] = states[-1]["calls"]
    assert_close(averaged_state(module, average), wanted, tolerance=1e-6)
    assert_close(state(module), states[-1], tolerance=0.0)


def test_frozen_parameters_cost_nothing() -> None:
    module = model()
    module[0].requires_grad_(False)
    average = WeightAverage(SingleStrategy(module), EmaConfig(decay=0.9))
    assert set(average.tensors()) == {
        *(f"1.{name}" for name in ("weight", "bias", "running_mean", "running_var")),
        *("2.weight", "2.bias", "n_averaged"),
    }


# In runs


def test_a_run_says_how_its_averages_do(train: Callable[..., Ended]) -> None:
    more = ["train.ema.decay=0.5", "train.swa.first_update=4", "train.max_updates=6", "train.eval_every=2"]
    ended = train(*TINY, "data.evaluation=${data.train}", *more, "run_dir=run")
    assert ended.status == 0, ended.err
    assert "ema/loss" in ended.out
    first, *later = (line["eval"] for line in evaluations(Path("run")))
    assert "ema/loss" in first
    assert "swa/loss" not in first, "it has not begun"
    assert all({"ema/loss", "ema/accuracy", "swa/loss"} <= line.keys() for line in later)
    raw, ema = load_file("run/model.safetensors"), load_file("run/model-ema.safetensors")
    assert raw.keys() == ema.keys()
    assert any(not torch.equal(raw[name], ema[name]) for name in raw)


def test_updates_are_the_same_with_and_without(train: Callable[..., Ended]) -> None:
    more = ["data.evaluation=${data.train}", "train.eval_every=1", "train.max_updates=6"]
    assert train(*TINY, *more, "run_dir=with", "train.ema.decay=0.5", "train.swa.first_update=1").status == 0
    assert train(*TINY, *more, "run_dir=without").status == 0
    curves = [[(line["loss"], line["grad_norm"]) for line in updates(Path(run))] for run in ("with", "without")]
    assert curves[0] == curves[1]


class SometimesNan(nn.Module):
    """A classifier whose third forward in training gives NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 10)
        self.forwards = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.forwards += self.training
        logits: Tensor = self.layer(inputs)
        return logits * math.nan if self.training and self.forwards == 3 else logits


def test_skipped_updates_are_not_averaged(train: Callable[..., Ended]) -> None:
    """With three updates, of which the last is skipped, the mean is that of two."""
    kept = [override for override in TINY if not override.startswith("model")]
    more = [
        "model=custom",
        "model._target_=test_weight_average.SometimesNan",
        "train.on_nonfinite=skip",
        "schedule=constant",
    ]
    swa = ["train.swa.first_update=1", "checkpoint.every_updates=1", "checkpoint.keep_last=9"]
    assert train(*kept, *more, *swa, "run_dir=run").status == 0
    assert [line.get("skipped", False) for line in updates(Path("run"))] == [False, False, True]
    assert train(*kept, *more, *swa, "run_dir=two", "train.max_updates=2").status == 0
    averages = [load_file(f"{run}/model-swa.safetensors") for run in ("run", "two")]
    assert_close(averages[0], averages[1], tolerance=0.0)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.ema.decay=1", "train.ema.decay=1.0 is impossible"),
        ("train.swa.first_update=9", "comes after the run's last update, 3"),
        ("train.swa.every_updates=0", "train.swa.every_updates"),
    ],
)
def test_averages_that_can_not_be(train: Callable[..., Ended], override: str, said: str) -> None:
    ended = train(*TINY, override)
    assert ended.status == 2
    assert said in ended.err
    assert "Traceback" not in ended.err


def test_the_best_is_chosen_by_an_average(train: Callable[..., Ended]) -> None:
    """Before the average has begun there is nothing to compare, and that is no mistake."""
    more = ["data.evaluation=${data.train}", "train.eval_every=1", "train.max_updates=5", "train.swa.first_update=3"]
    best = ["checkpoint.best_metric=swa/loss", "checkpoint.keep_best=1", "train.early_stopping.metric=swa/loss"]
    assert train(*TINY, *more, *best, "train.early_stopping.patience=9", "run_dir=run").status == 0
    losses = {line["update"]: line["eval"].get("swa/loss", math.inf) for line in evaluations(Path("run"))}
    kept = {int(path.name.removeprefix("update-")) for path in Path("run/checkpoints").glob("update-*")}
    assert min(losses, key=losses.__getitem__) in kept
    assert train(*TINY, *more, "checkpoint.best_metric=swa/los", "checkpoint.keep_best=1").status == 2


def test_an_average_of_somebody_s_own_loop_is_saved_and_restored(tmp_path: Path) -> None:
    def parts() -> tuple[nn.Module, torch.optim.Optimizer, AveragedModel, Checkpointer]:
        module = model()
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
        ema = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9))  # type: ignore[no-untyped-call]
        config = CheckpointConfig(async_save=False)
        tensors: dict[str, Any] = {"ema": ema.state_dict()}
        return module, optimizer, ema, Checkpointer(tmp_path, module, optimizer, config=config, tensors=tensors)

    module, _, ema, checkpointer = parts()
    for _ in range(3):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1.0)
        ema.update_parameters(module)
    checkpointer.save(3, {})
    _, _, other, restoring = parts()
    newest = restoring.newest()
    assert newest is not None
    restoring.restore(newest)
    assert_close(dict(other.state_dict()), dict(ema.state_dict()), tolerance=0.0)
    assert int(other.n_averaged) == 3
    restoring.tensors = {"ema": {"another": torch.zeros(3)}}
    with pytest.raises(UserError, match="holds another ema: ema/another is missing"):
        restoring.restore(newest)


def test_an_average_that_is_added_to_a_run_begins_where_it_is_added(
    train: Callable[..., Ended],
) -> None:
    assert train(*TINY, "run_dir=run").status == 0
    ended = train(*TINY, "run_dir=run", "train.max_updates=5", "train.ema.decay=0.5", "train.ema.first_update=5")
    assert ended.status == 0, ended.err
    assert "has no ema, which begins anew" in ended.out + ended.err
    raw, ema = load_file("run/model.safetensors"), load_file("run/model-ema.safetensors")
    assert_close(ema, raw, tolerance=0.0)


def test_an_average_whose_beginning_is_put_off_begins_anew(train: Callable[..., Ended]) -> None:
    more = ["train.epochs=null", "train.swa.every_updates=1"]
    assert train(*TINY, *more, "run_dir=run", "train.max_updates=3", "train.swa.first_update=1").status == 0
    ended = train(*TINY, *more, "run_dir=run", "train.max_updates=6", "train.swa.first_update=6")
    assert ended.status == 0, ended.err
    assert "train.swa.first_update=6 is later than the checkpoint" in ended.out + ended.err
    assert_close(load_file("run/model-swa.safetensors"), load_file("run/model.safetensors"), tolerance=0.0)


def test_patience_begins_with_the_average(train: Callable[..., Ended]) -> None:
    more = ["train.epochs=null", "train.max_updates=7", "train.eval_every=1", "train.swa.first_update=6"]
    stopping = ["train.early_stopping.metric=swa/loss", "train.early_stopping.patience=2"]
    ended = train(*TINY, *more, *stopping, "run_dir=run")
    assert ended.status == 0, ended.err
    assert len(updates(Path("run"))) == 7


def test_the_best_by_another_metric_are_chosen_anew(train: Callable[..., Ended]) -> None:
    saving = ["checkpoint.keep_best=1", "checkpoint.keep_last=1", "train.epochs=null", "train.eval_every=1"]
    assert train(*TINY, *saving, "run_dir=run", "checkpoint.best_metric=accuracy", "train.max_updates=3").status == 0
    ended = train(*TINY, *saving, "run_dir=run", "checkpoint.best_metric=loss", "train.max_updates=6")
    assert ended.status == 0, ended.err
    assert "chosen by accuracy max, and are from here on by loss min" in ended.out + ended.err
    losses = {line["update"]: line["eval"]["loss"] for line in evaluations(Path("run")) if line["update"] > 3}
    kept = {int(path.name.rpartition("-")[2]) for path in Path("run/checkpoints").glob("update-*")}
    assert kept == {6, min(losses, key=losses.__getitem__)}
