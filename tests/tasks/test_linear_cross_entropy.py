"""The cross-entropy in chunks against that of whole logits: loss, gradients, memory, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distaccum.errors import UserError
from distaccum.runtime.memory import metered
from distaccum.tasks.linear_cross_entropy import linear_cross_entropy_sum

CPU = torch.device("cpu")
Inputs = dict[str, Any]


def made(
    rows: int = 23, width: int = 5, classes: int = 11, dtype: torch.dtype = torch.float64, ignored: float = 0.3
) -> Inputs:
    generator = torch.Generator().manual_seed(rows + 100 * width + 10_000 * classes)
    targets = torch.randint(classes, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = -100
    found = {
        "hidden": torch.randn(rows, width, generator=generator, dtype=dtype),
        "weight": torch.randn(classes, width, generator=generator, dtype=dtype),
        "bias": torch.randn(classes, generator=generator, dtype=dtype),
    }
    return {**{name: tensor.requires_grad_() for name, tensor in found.items()}, "targets": targets}


def whole(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    row_weights: Tensor | None = None,
    **options: Any,
) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    losses = F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none", **options
    )
    return (losses if row_weights is None else losses * row_weights).sum()


def gradients(loss: Tensor, inputs: Inputs) -> list[Tensor]:
    """Those of all that require one, of a loss with a factor, as a scaler or a term has."""
    leaves = [value for value in inputs.values() if isinstance(value, Tensor) and value.requires_grad]
    return list(torch.autograd.grad(loss * 3, leaves))


def distance(one: Tensor, other: Tensor) -> float:
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).norm() / other.norm().clamp(min=0.1))


def assert_same(inputs: Inputs, tolerance: float = 1e-12, *, chunk: int | None = 4, **options: Any) -> None:
    loss, *_ = linear_cross_entropy_sum(**inputs, chunk=chunk, **options)
    wanted = whole(**inputs, **options)
    assert distance(loss, wanted) < tolerance
    for found, right in zip(gradients(loss, inputs), gradients(wanted, inputs), strict=True):
        assert found.dtype == right.dtype
        assert distance(found, right) < tolerance


@settings(max_examples=60)
@given(
    rows=st.integers(1, 20),
    width=st.integers(1, 6),
    classes=st.integers(1, 12),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    chunk=st.sampled_from([1, 3, 8, 20, None]),
    smoothing=st.sampled_from([0.0, 0.1]),
    is_biased=st.booleans(),
    is_weighted=st.booleans(),
)
def test_loss_and_gradients_are_those_of_whole_logits(
    rows: int,
    width: int,
    classes: int,
    ignored: float,
    chunk: int | None,
    smoothing: float,
    is_biased: bool,
    is_weighted: bool,
) -> None:
    inputs = made(rows, width, classes, ignored=ignored)
    if not is_biased:
        inputs["bias"] = None
    row_weights = torch.linspace(0.1, 2, rows, dtype=torch.float64) if is_weighted else None
    assert_same(inputs, chunk=chunk, label_smoothing=smoothing, row_weights=row_weights)


def test_other_gradients_would_be_noticed() -> None:
    inputs = made(ignored=0.0)
    wrong = {**inputs, "targets": (inputs["targets"] + torch.eye(23)[3].long()) % 11}
    right = gradients(whole(**inputs), inputs)
    for found, wanted in zip(gradients(linear_cross_entropy_sum(**wrong)[0], wrong), right, strict=True):
        assert distance(found, wanted) > 1e-3
    one_chunk_less = {**inputs, "hidden": inputs["hidden"][4:], "targets": inputs["targets"][4:]}
    loss, *_ = linear_cross_entropy_sum(**one_chunk_less, chunk=4)
    assert distance(loss, whole(**inputs)) > 1e-3


def test_losses_and_predictions_of_rows() -> None:
    inputs = made(200, ignored=0.0)
    predicted = F.linear(inputs["hidden"], inputs["weight"], inputs["bias"]).argmax(1)
    inputs["targets"][50:120] = 7  # a class, and ignored
    _, losses, found = linear_cross_entropy_sum(**inputs, ignore_index=7, chunk=16)
    assert not losses.requires_grad
    assert torch.equal(found, predicted)
    logits = F.linear(inputs["hidden"], inputs["weight"], inputs["bias"])
    wanted = F.cross_entropy(logits, inputs["targets"], reduction="none", ignore_index=7)
    assert distance(losses, wanted) < 1e-12
    assert not losses[inputs["targets"] == 7].any()
    assert_same(inputs, ignore_index=7)


def test_large_logits_do_not_overflow() -> None:
    inputs = made()
    inputs["hidden"] = (inputs["hidden"].detach() * 1e4).requires_grad_()
    assert_same(inputs)


def test_no_rows() -> None:
    inputs = made(rows=0)
    loss, *_ = linear_cross_entropy_sum(**inputs)
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in gradients(loss, inputs))


@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias"), ("hidden",)])
def test_what_is_frozen_gets_no_gradient_and_no_buffer(frozen: tuple[str, ...]) -> None:
    inputs = made(classes=4000)
    for name in frozen:
        inputs[name].requires_grad_(False)
    assert_same(inputs)
    with metered(CPU) as meter:
        loss, *_ = linear_cross_entropy_sum(**inputs, chunk=1)
    kept = sum(inputs[name].nbytes for name in ("hidden", "weight", "bias") if name not in frozen)
    assert kept <= meter.now < kept + 1000
    assert loss.requires_grad


def test_a_tied_weight_gets_both_gradients() -> None:
    inputs = made()
    tokens = torch.arange(23) % 11

    def tied(loss_of: Callable[..., Any]) -> Tensor:
        hidden = torch.tanh(F.embedding(tokens, inputs["weight"]))
        loss = loss_of(hidden, inputs["weight"], inputs["targets"])
        loss = loss[0] if isinstance(loss, tuple) else loss
        return torch.autograd.grad(loss, inputs["weight"])[0]

    assert distance(tied(linear_cross_entropy_sum), tied(whole)) < 1e-12


def test_several_micro_steps_add_up_and_the_first_gradient_is_not_copied() -> None:
    inputs = made()
    loss, *_ = linear_cross_entropy_sum(**inputs)
    with metered(CPU) as meter:
        loss.backward()  # type: ignore[no-untyped-call]
        assert meter.lap() < inputs["weight"].nbytes  # what was kept becomes the gradient itself
    linear_cross_entropy_sum(**inputs)[0].backward()  # type: ignore[no-untyped-call]
    wanted = torch.autograd.grad(2 * whole(**inputs), inputs["weight"])[0]
    assert distance(inputs["weight"].grad, wanted) < 1e-12


def test_under_activation_checkpointing() -> None:
    inputs = made()

    def loss_of(hidden: Tensor) -> Tensor:
        return linear_cross_entropy_sum(**{**inputs, "hidden": hidden})[0]

    for is_reentrant in (False, True):
        loss = checkpoint(
            lambda hidden: linear_cross_entropy_sum(**{**inputs, "hidden": hidden})[0],
            inputs["hidden"],
            use_reentrant=is_reentrant,
        )
        loss.backward()
        wanted = torch.autograd.grad(whole(**inputs), [inputs["hidden"], inputs["weight"]])
        for name, right in zip(("hidden", "weight"), wanted, strict=True):
            assert distance(inputs[name].grad, right) < 1e-12
            inputs[name].grad = None


def test_without_gradients_nothing_is_kept() -> None:
    inputs = made(classes=4000)
    with metered(CPU) as meter, torch.no_grad():
        loss, *_ = linear_cross_entropy_sum(**inputs, chunk=1)
        assert meter.lap() < inputs["weight"].nbytes
    assert distance(loss, whole(**inputs)) < 1e-12


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_formats(dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    inputs = made(200, 16, 300, dtype=dtype)
    exact = {
        name: value.detach().double().requires_grad_() if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        loss, *_ = linear_cross_entropy_sum(**inputs, chunk=16)
        plain = whole(**inputs)
    assert loss.dtype == torch.float32
    wanted = whole(**exact)
    right = gradients(wanted, exact)
    assert distance(loss, wanted) < max(1e-6, 2 * distance(plain, wanted))
    for found, other, exactly in zip(gradients(loss, inputs), gradients(plain, inputs), right, strict=True):
        assert found.dtype == other.dtype
        # No worse than the same formats with whole logits, although gradients are added up over many chunks.
        assert distance(found, exactly) < max(1e-6, 1.1 * distance(other, exactly))


def test_small_gradients_survive_float16() -> None:
    """Most probabilities of a large vocabulary are below what float16 can hold; a scaler multiplies too late."""
    inputs = made(64, 16, 8000, dtype=torch.float16)
    exact = {
        name: value.detach().double().requires_grad_() if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    right = torch.autograd.grad(whole(**exact), exact["bias"])[0]
    found = torch.autograd.grad(linear_cross_entropy_sum(**inputs)[0] * 512.0, inputs["bias"])[0]
    rare = torch.ones(8000, dtype=torch.bool)
    rare[inputs["targets"].clamp(min=0)] = False
    assert distance(found[rare].double() / 512, right[rare]) < 2e-3


def test_a_second_backward_is_refused() -> None:
    loss, *_ = linear_cross_entropy_sum(**made())
    loss.backward(retain_graph=True)
    with pytest.raises(UserError, match="has had its backward"):
        loss.backward()  # type: ignore[no-untyped-call]


def test_a_second_derivative_is_refused() -> None:
    inputs = made()
    loss, *_ = linear_cross_entropy_sum(**inputs)
    with pytest.raises(UserError, match="can't be differentiated twice"):
        torch.autograd.grad(loss, inputs["weight"], create_graph=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"targets": torch.zeros(22, dtype=torch.int64)}, r"got \[23, 5\], \[11, 5\], \[22\], \[11\], none"),
        ({"targets": torch.full((23,), 11)}, r"one of the targets is \[11\], and the model has 11 outputs"),
        ({"bias": torch.zeros(5)}, r"got \[23, 5\], \[11, 5\], \[23\], \[5\], none"),
        ({"row_weights": torch.zeros(11)}, r"\[11\]\.$"),
        ({"weight": torch.zeros(11, 5)}, "one format, and they are torch.float64 and torch.float32"),
        ({"chunk": 0}, "chunk=0 is impossible"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1.0 must lie in \[0, 1\)"),
    ],
)
def test_what_does_not_go_together_is_refused(change: Inputs, said: str) -> None:
    with pytest.raises(UserError, match=said):
        linear_cross_entropy_sum(**{**made(), **change})


def peak_of(loss_of: Callable[..., Any], inputs: Inputs, device: torch.device) -> int:
    with metered(device) as meter:
        loss = loss_of(**inputs)
        (loss[0] if isinstance(loss, tuple) else loss).backward()
        return meter.lap()


def test_the_peak_is_below_half_of_that_of_whole_logits() -> None:
    inputs = made(512, 16, 32_000, dtype=torch.float32)
    plain = peak_of(whole, inputs, CPU)
    for name in ("hidden", "weight", "bias"):
        inputs[name].grad = None
    chunked = peak_of(linear_cross_entropy_sum, inputs, CPU)
    assert chunked < plain / 4
    # One buffer of each gradient, and an eighth of the logits, before and after the softmax.
    logits = 512 * 32_000 * 4
    gradients = sum(inputs[name].nbytes for name in ("hidden", "weight", "bias"))
    assert chunked < 1.1 * (logits / 8 * 2 + gradients)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    device = torch.device("cuda")
    inputs = {
        name: value.detach().to(device).requires_grad_(value.requires_grad)
        for name, value in made(4096, 64, 32_000, dtype=dtype).items()
    }
    cast = torch.autocast("cuda", dtype=autocast or torch.bfloat16, enabled=autocast is not None)
    exact = {
        name: value.detach().double().requires_grad_() if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    right = gradients(whole(**exact), exact)
    with cast:
        torch.cuda.set_sync_debug_mode("error")  # the host does not wait
        try:
            loss, *_ = linear_cross_entropy_sum(**inputs, chunk=256)
            found = gradients(loss, inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        others = gradients(whole(**inputs), inputs)
    for mine, other, exactly in zip(found, others, right, strict=True):
        assert mine.dtype == other.dtype
        assert distance(mine, exactly) < max(1e-5, 1.1 * distance(other, exactly))
    del exact, right, found, others, loss
    with cast:
        plain = peak_of(whole, inputs, device)
        for name in ("hidden", "weight", "bias"):
            inputs[name].grad = None
        assert peak_of(linear_cross_entropy_sum, inputs, device) < plain / 3
