from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distaccum.errors import UserError
from distaccum.models.outputs import logits_of
from distaccum.tasks import Classification
from distaccum.tasks.model_io import call_model, inputs_and_targets

PIXELS, MASK, LABELS = torch.randn(3, 4), torch.ones(3), torch.tensor([0, 1, 1])
NESTED = {"left": PIXELS, "name": ["a", "b", "c"]}
Sample = namedtuple("Sample", ["pixels", "name", "label"])


@pytest.mark.parametrize(
    ("batch", "inputs"),
    [
        ((PIXELS, LABELS), PIXELS),
        ([PIXELS, MASK, LABELS], (PIXELS, MASK)),
        ((PIXELS, ["a.png", "b.png", "c.png"], LABELS), PIXELS),
        ((PIXELS, LABELS, ["a.png", "b.png", "c.png"]), PIXELS),
        (Sample(PIXELS, ["a", "b", "c"], LABELS), PIXELS),
        (({"x": PIXELS}, LABELS), {"x": PIXELS}),
        ({"pixels": PIXELS, "labels": LABELS, "path": ["a", "b", "c"]}, {"pixels": PIXELS}),
        ({"pixels": PIXELS, "mask": MASK, "target": LABELS}, {"pixels": PIXELS, "mask": MASK}),
        ({"pixels": NESTED, "label": LABELS}, {"pixels": NESTED}),
    ],
)
def test_batches_are_taken_apart(batch: Any, inputs: Any) -> None:
    found, targets = inputs_and_targets(batch, "Task")
    assert targets is LABELS
    assert type(found) is type(inputs)
    if isinstance(inputs, Tensor):
        assert found is inputs
    elif isinstance(inputs, dict):
        assert list(found) == list(inputs)
        assert all(found[name] is inputs[name] for name in inputs)
    else:
        assert all(mine is other for mine, other in zip(found, inputs, strict=True))


class Scores(nn.Module):
    """Logits in the form that is asked for, of inputs given in one."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, pixels: Tensor, mask: Tensor | None = None) -> Any:
        logits = pixels[:, :2] if mask is None else pixels[:, :2] * mask[:, None]
        return {
            "tensor": logits,
            "tuple": (logits, pixels),
            "dict": {"hidden": pixels, "logits": logits},
            "only one": {"scores": logits},
            "object": SimpleNamespace(logits=logits, loss=None),
        }[self.form]


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict", "only one", "object"])
@pytest.mark.parametrize(
    "batch", [(PIXELS, LABELS), (PIXELS, MASK, LABELS), {"mask": MASK, "pixels": PIXELS, "labels": LABELS}]
)
def test_a_task_takes_every_form(form: str, batch: Any) -> None:
    output = Classification()(Scores(form), batch)
    assert torch.equal(output.loss_sum, F.cross_entropy(PIXELS[:, :2], LABELS, reduction="sum"))


@pytest.mark.parametrize("output", [None, {"hidden": PIXELS, "mask": MASK}, "text", ("text", PIXELS, MASK)])
def test_outputs_without_logits(output: Any) -> None:
    with pytest.raises(UserError, match=rf"the model returned a {type(output).__name__}.* `logits`"):
        logits_of(output)


def test_how_models_are_called() -> None:
    calls: list[Any] = []

    class Recording(nn.Module):
        def forward(self, *arguments: Any, **named: Any) -> None:
            calls.append((arguments, named))

    for inputs in (PIXELS, (PIXELS, MASK), {"pixels": PIXELS}):
        call_model(Recording(), inputs)
    assert [(len(arguments), list(named)) for arguments, named in calls] == [(1, []), (2, []), (0, ["pixels"])]


def test_a_name_that_the_model_does_not_take_is_said() -> None:
    with pytest.raises(UserError, match=r"the samples have words, and the model takes no such argument .*forward"):
        call_model(nn.Linear(1, 1), {"input": torch.ones(1), "words": torch.ones(1)})
    with pytest.raises(TypeError, match="positional argument"):
        call_model(nn.Bilinear(1, 1, 1), {"input1": torch.ones(1)})
