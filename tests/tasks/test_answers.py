"""What a task of somebody's own may answer: numbers of any kind, and one message for everything else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command_line import TINY, Ended, evaluations, updates
from torch import Tensor, nn

from distaccum import EvaluationLoader, Task, TaskOutput, UserError, evaluate_model
from distaccum.tasks import checked_output
from distaccum.training.evaluation import metrics_of

LOSS = torch.tensor(1.5)


class Answering(Task):
    """Squares of the outputs; the sums and metrics are made of `what`."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        inputs, _ = batch
        loss_sum = model(inputs).square().sum()
        if self.what == "a dictionary":
            return {"loss_sum": loss_sum, "weight": len(inputs)}  # type: ignore[return-value]
        count: Any = {"a number": 2, "NumPy's": np.float32(2)}.get(self.what, torch.tensor(2.0))
        return TaskOutput(
            loss_sum, np.int64(len(inputs)), {"loss" if self.what == "a sum named loss" else "two": count}
        )

    def metrics(self, sums: dict[str, Tensor], weight: float) -> dict[str, float]:
        if self.what == "metrics of all kinds":
            found: dict[str, Any] = {"t": sums["two"] / 4, "n": np.float32(0.5), "a": np.ones(1), "i": 3, "b": True}
            return found
        return super().metrics(sums, weight)


RUN = [*TINY, "task=custom", f"task._target_={__name__}.Answering", "run_dir=run"]


@pytest.mark.parametrize("what", ["a number", "NumPy's"])
def test_sums_may_be_numbers_of_any_kind(what: str, train: Callable[..., Ended], tmp_path: Path) -> None:
    assert train(*RUN, f"+task.what={what!r}").status == 0
    # 16 samples in one micro-batch of an update, and in the evaluation.
    assert [line["metrics"] for line in updates(Path("run"))] == [{"two": 2 / 16}] * 3
    assert evaluations(Path("run"))[-1]["eval"]["two"] == 2 / 16


def test_metrics_may_be_numbers_of_any_kind(train: Callable[..., Ended], tmp_path: Path) -> None:
    assert train(*RUN, "+task.what=metrics of all kinds").status == 0
    wanted = {"t": 0.5, "n": 0.5, "a": 1.0, "i": 3.0, "b": 1.0}
    assert updates(Path("run"))[0]["metrics"] == wanted
    found = evaluations(Path("run"))[-1]["eval"]
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "a dictionary",
            "the task returned a dict, not a distaccum.TaskOutput with a tensor as loss_sum. Return "
            "TaskOutput(loss_sum=…, weight=…).",
        ),
        ("a sum named loss", "the task's metric loss would hide the run's own loss: give it another name."),
    ],
)
def test_a_run_ends_with_one_message(what: str, message: str, train: Callable[..., Ended], tmp_path: Path) -> None:
    assert train(*RUN, f"+task.what={what}").message == message


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (None, "the task returned a NoneType, not a distaccum.TaskOutput"),
        (SimpleNamespace(loss_sum=LOSS, weight=1, sums={}), "the task returned a SimpleNamespace, not a"),
        (TaskOutput(1.5, 1), r"the task returned a TaskOutput, not a distaccum.TaskOutput with a tensor as loss_sum"),
        (TaskOutput(LOSS, None), "the task's weight is a NoneType, where a number is wanted"),
        (TaskOutput(LOSS, "3"), "the task's weight is a str, where a number is wanted"),
        (TaskOutput(LOSS, 1, {"a": None}), "the task's sum a is a NoneType, where a number is wanted"),
        (TaskOutput(LOSS, 1, {"a": "3"}), "the task's sum a is a str, where a number is wanted"),
        (
            TaskOutput(LOSS, 1, {"a": np.ones(2)}),
            r"the task's sum a is a ndarray of shape \[2\], where a number is wanted",
        ),
    ],
)
def test_other_outputs_are_refused(output: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        checked_output(output)


def test_outputs_keep_their_tensors() -> None:
    sums = {"a": torch.ones(2, dtype=torch.int64), "b": 7}
    output = TaskOutput(LOSS, torch.tensor(3), sums)  # type: ignore[arg-type]
    checked = checked_output(output)
    assert checked.loss_sum is LOSS
    assert checked.sums["a"] is sums["a"]
    assert (checked.sums["b"].dtype, float(checked.sums["b"])) == (torch.float64, 7.0)
    assert sums["b"] == 7, "the task's own dictionary stays as it was"


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (None, r"the task's metrics\(\) returned a NoneType, not numbers by name"),
        ({"a": None}, "the task's metric a is a NoneType, where a number is wanted"),
        ({"a": "0.5"}, "the task's metric a is a str, where a number is wanted"),
        ({"a": torch.ones(2)}, r"the task's metric a is a Tensor of shape \[2\], where a number is wanted"),
        ({"a": 1j}, "the task's metric a is a complex, where a number is wanted"),
        ({"lr": 0.5}, "the task's metric lr would hide the run's own lr: give it another name"),
    ],
)
def test_other_metrics_are_refused(metrics: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        metrics_of(SimpleNamespace(metrics=lambda sums, weight: metrics), {}, 1.0)


def test_a_sum_of_several_numbers_wants_metrics_of_one_s_own() -> None:
    sums = {"confusion": torch.ones(2, 2, dtype=torch.float64)}
    for task in (Answering("a tensor"), lambda model, batch: None):
        with pytest.raises(
            UserError, match=r"the task's metric confusion is a Tensor of shape \[2, 2\], where a number"
        ):
            metrics_of(task, sums, 4.0)


def test_a_weight_beyond_float32_counts_to_the_last_sample() -> None:
    data = torch.utils.data.TensorDataset(torch.ones(1, 2), torch.zeros(1))
    loader = EvaluationLoader(data, batch_size=1)
    _, weight, _ = evaluate_model(
        nn.Linear(2, 1), lambda model, batch: TaskOutput(LOSS, 2**24 + 1.0), loader, device=torch.device("cpu")
    )
    assert weight == 2**24 + 1
