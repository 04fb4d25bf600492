"""The accumulator in one process. Its behaviour on several ranks is in tests/distributed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from examples import RaggedTokens, TokenClassifier, adamw, curves, distance, flat, token_loss, train_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from distaccum import Accumulator, UserError, WindowLoader
from distaccum.config import SingleConfig
from distaccum.config.enums import PrecisionName
from distaccum.config.optimizers import AdamConfig, SGDConfig
from distaccum.strategies import SingleStrategy, place
from distaccum.training.optim import build_optimizer


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 41), st.integers(1, 9))
def test_the_update_does_not_depend_on_the_cut(global_batch_size: int, micro_batch_size: int) -> None:
    options: dict[str, Any] = {"global_batch_size": global_batch_size, "updates": 4}
    wanted, wanted_parameters = train_tokens(None, micro_batch_size=global_batch_size, **options)
    found, parameters = train_tokens(None, micro_batch_size=min(micro_batch_size, global_batch_size), **options)
    assert distance(curves(found)[0], curves(wanted)[0]) < 1e-12
    assert distance(curves(found)[1], curves(wanted)[1]) < 1e-12
    assert distance(parameters, wanted_parameters) < 1e-12


def test_the_update_is_the_one_that_torch_makes_of_the_large_batch() -> None:
    """Against a hand-written large-batch step, with torch's own clipping."""
    found, parameters = train_tokens(None, micro_batch_size=3, updates=3)
    model = TokenClassifier()
    optimizer = adamw(model)
    data = RaggedTokens()
    losses, norms = [], []
    for window in WindowLoader(data, global_batch_size=16, seed=1):
        loss_sum, weight = token_loss(model, data.collate_fn([data[i] for ids in window.sample_indices for i in ids]))
        optimizer.zero_grad()
        (loss_sum / weight).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.05)))
        optimizer.step()
        losses.append(float(loss_sum.detach() / weight))
    assert distance(curves(found)[0], losses) < 1e-12
    assert distance(curves(found)[1], norms) < 1e-12
    assert distance(parameters, flat(model)) < 1e-12


def _accumulator(**options: Any) -> tuple[nn.Module, Accumulator]:
    model = nn.Linear(2, 1).double()
    return model, Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


BATCHES = [torch.ones(size, 2, dtype=torch.float64) * size for size in (3, 1, 2)]


def _train(model: nn.Module, accumulator: Accumulator, batches: Any) -> Any:
    with accumulator.window(batches) as micro_batches:
        for batch in micro_batches:
            accumulator.backward(model(batch).square().sum(), len(batch))
    return accumulator.step()


def test_a_list_and_a_generator_are_windows_too() -> None:
    torch.manual_seed(0)
    first, by_list = _accumulator()
    second, by_generator = _accumulator()
    second.load_state_dict(first.state_dict())

    def generate() -> Iterator[Tensor]:
        yield from BATCHES

    assert _train(first, by_list, BATCHES).loss == _train(second, by_generator, generate()).loss
    assert torch.equal(flat(first), flat(second))


def test_parameters_move_in_the_step_only_and_gradients_are_cleared_after_it() -> None:
    model, accumulator = _accumulator()
    before = flat(model)
    with accumulator.window(BATCHES) as micro_batches:
        for batch in micro_batches:
            accumulator.backward(model(batch).square().sum(), len(batch))
            assert torch.equal(flat(model), before)
    result = accumulator.step()
    assert not torch.equal(flat(model), before)
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)
    assert (result.micro_steps, result.weight, result.sync_calls, result.sync_bytes) == (3, 6.0, 0, 0)
    assert accumulator.updates == 1


def test_gradients_from_before_do_not_leak_into_the_first_window() -> None:
    model, _ = _accumulator()
    model(BATCHES[0]).sum().backward()
    accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.0))
    norm = _train(model, accumulator, BATCHES).grad_norm
    assert _train(model, accumulator, BATCHES).grad_norm == pytest.approx(norm, rel=1e-12)


def test_clipping_acts_on_the_mean_gradient_of_the_window() -> None:
    model, accumulator = _accumulator(clip_norm=0.5)
    before = flat(model)
    result = _train(model, accumulator, BATCHES)
    assert result.grad_norm > 0.5
    assert float((flat(model) - before).norm()) == pytest.approx(0.1 * 0.5, rel=1e-5)


@pytest.mark.parametrize("clip_norm", [0, -1.0, math.nan])
def test_a_clip_norm_that_is_none_is_refused(clip_norm: float) -> None:
    with pytest.raises(UserError, match=rf"clip_norm={clip_norm} is impossible"):
        _accumulator(clip_norm=clip_norm)


def test_sums_are_added_up_whatever_their_shape() -> None:
    model, accumulator = _accumulator()
    with accumulator.window(BATCHES) as micro_batches:
        for batch in micro_batches:
            sums = {"matrix": torch.full((2, 3), float(len(batch))), "count": torch.tensor(1)}
            accumulator.backward(model(batch).sum(), torch.tensor(len(batch)), sums)
    result = accumulator.step()
    assert torch.equal(result.sums["matrix"], torch.full((2, 3), 6.0, dtype=torch.float64))
    assert result.sums["count"].tolist() == 3
    assert result.weight == 6.0


def test_misuse_is_an_error_and_the_next_window_is_clean() -> None:
    model, accumulator = _accumulator()

    def window_without_backward() -> None:
        with accumulator.window(BATCHES) as micro_batches:
            for _ in micro_batches:
                pass

    def window_left_early() -> None:
        with accumulator.window(BATCHES) as micro_batches:
            for batch in micro_batches:
                accumulator.backward(model(batch).sum(), 1)
                break

    def two_backwards() -> None:
        with accumulator.window(BATCHES) as micro_batches:
            for batch in micro_batches:
                accumulator.backward(model(batch).sum(), 1)
                accumulator.backward(model(batch).sum(), 1)

    def empty_window() -> None:
        with accumulator.window([]) as micro_batches:
            for _ in micro_batches:
                pass

    def longer_than_its_length() -> None:
        class Longer(list[Tensor]):
            def __len__(self) -> int:
                return 2

        _train(model, accumulator, Longer(BATCHES))

    for misuse, said in (
        (window_without_backward, "micro-step 1 ended without"),
        (window_left_early, r"left after 1 micro-step"),
        (two_backwards, "once for each micro-batch"),
        (empty_window, "the window has no micro-batch"),
        (longer_than_its_length, r"have the len\(\) 2, and there are more"),
        (accumulator.step, "after a whole window"),
    ):
        with pytest.raises((RuntimeError, UserError), match=said):
            misuse()
    norm = _train(model, accumulator, BATCHES).grad_norm
    twin = nn.Linear(2, 1).double()
    twin.load_state_dict(model.state_dict())
    assert math.isfinite(norm)
    with accumulator.window(BATCHES) as micro_batches:
        for batch in micro_batches:
            accumulator.backward(model(batch).sum(), 1)
    with pytest.raises(RuntimeError, match="was neither ended by step"), accumulator.window(BATCHES):
        pass


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda model, batch: model(batch), r"got shape \(3, 1\), requires_grad=True"),
        (lambda model, batch: model(batch).sum().detach(), r"got shape \(\), requires_grad=False"),
    ],
)
def test_a_loss_that_is_no_sum_is_refused(loss: Any, said: str) -> None:
    model, accumulator = _accumulator()

    def train() -> None:
        with accumulator.window(BATCHES) as micro_batches:
            for batch in micro_batches:
                accumulator.backward(loss(model, batch), len(batch))

    with pytest.raises(UserError, match=said):
        train()


def test_nan_inf_and_nothing_to_learn_from_stop_before_the_step() -> None:
    for factor, weight, said in (
        (math.nan, 1.0, r"update 1: the loss is nan \(rank 0, micro-steps 1, 2, 3\)"),
        (math.inf, 1.0, r"update 1: the loss is (inf|-inf|nan)"),
        (1.0, 0.0, "update 1: the total weight of the window is 0"),
    ):
        model, accumulator = _accumulator()
        before = flat(model)
        with accumulator.window(BATCHES) as micro_batches:
            for batch in micro_batches:
                accumulator.backward(model(batch).sum() * factor, weight)
        with pytest.raises(UserError, match=said):
            accumulator.step()
        assert torch.equal(flat(model), before)


def test_an_infinite_gradient_of_a_finite_loss_stops_too() -> None:
    model, accumulator = _accumulator()
    with accumulator.window(BATCHES) as micro_batches:
        for batch in micro_batches:
            loss_sum = model(batch).sum()
            loss_sum.register_hook(lambda gradient: gradient * math.inf)
            accumulator.backward(loss_sum, len(batch))
    with pytest.raises(UserError, match="but the norm of the gradient is"):
        accumulator.step()


def test_nonfinite_updates_can_be_skipped() -> None:
    model, accumulator = _accumulator(skip_nonfinite=True)
    before = flat(model)
    with accumulator.window(BATCHES) as micro_batches:
        for batch in micro_batches:
            accumulator.backward(model(batch).sum() * math.nan, 1)
    assert accumulator.step().skipped
    assert torch.equal(flat(model), before)
    assert not _train(model, accumulator, BATCHES).skipped


def test_a_model_that_takes_no_part_is_refused() -> None:
    _, accumulator = _accumulator()
    elsewhere = torch.ones(1, requires_grad=True)
    with accumulator.window(BATCHES) as micro_batches:
        for batch in micro_batches:
            accumulator.backward((elsewhere * batch.sum()).sum(), 1)
    with pytest.raises(UserError, match="no parameter of the optimizer got a gradient"):
        accumulator.step()


def test_the_scale_of_the_loss_changes_no_bit() -> None:
    """Losses are multiplied by a power of two on the way; the update must be the same without it, bit for bit."""
    plain, _ = train_tokens(None, micro_batch_size=3, updates=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distaccum.accumulation.accumulator.loss_scale", lambda *_: 1.0)
        unscaled, _ = train_tokens(None, micro_batch_size=3, updates=5)
    assert curves(plain) == curves(unscaled)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_micro_step_makes_the_host_wait() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1)).cuda()
    accumulator = Accumulator(model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), clip_norm=1.0)
    batches = [torch.randn(8, 32, device="cuda") for _ in range(4)]
    for _ in range(3):
        torch.cuda.set_sync_debug_mode("error")
        try:
            with accumulator.window(batches) as micro_batches:
                for batch in micro_batches:
                    accumulator.backward(model(batch).square().sum(), len(batch))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert math.isfinite(accumulator.step().loss)


def _bf16_gradient(accumulate_in_float32: bool) -> float:
    """Relative error of a gradient added up over 256 micro-steps, against the same micro-gradients added in float64."""
    torch.manual_seed(0)
    model = nn.Linear(64, 8).bfloat16()
    if accumulate_in_float32:
        strategy = place(model, SingleConfig(), torch.device("cpu"), PrecisionName.bf16_params)
    else:
        strategy = SingleStrategy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    accumulator = Accumulator(model, optimizer, strategy=strategy)
    batches = [torch.randn(2, 64).bfloat16() + 0.5 for _ in range(256)]
    exact = torch.zeros(8, 64, dtype=torch.float64)
    for batch in batches:
        exact += torch.autograd.grad(model(batch).float().square().sum(), model.weight)[0].double()
    handed: list[Tensor] = []
    found: list[Tensor] = []
    optimizer.register_step_pre_hook(lambda *_: handed.append(model.weight.grad.clone()))  # type: ignore[union-attr]
    with accumulator.window(batches) as micro_batches:
        for batch in micro_batches:
            accumulator.backward(model(batch).float().square().sum(), len(batch))
            found.append(model.weight.grad)  # type: ignore[arg-type]
    error = distance(found[-1].double() / accumulator._open.scale, exact)  # type: ignore[union-attr]
    accumulator.step()
    assert handed[0].dtype == torch.bfloat16, "optimizers take gradients of the parameters' format"
    assert distance(handed[0], exact / 512) < 0.01 or not accumulate_in_float32
    with accumulator.window(batches[:1]) as micro_batches:
        for batch in micro_batches:
            accumulator.backward(model(batch).float().square().sum(), len(batch))
    assert model.weight.grad is not None
    assert model.weight.grad.dtype == (torch.float32 if accumulate_in_float32 else torch.bfloat16), (
        "in later windows too"
    )
    return error


def test_bf16_parameters_accumulate_in_float32_and_what_bf16_would_lose() -> None:
    in_float32, in_bf16 = _bf16_gradient(True), _bf16_gradient(False)
    assert in_float32 < 1e-5
    assert in_bf16 > 1e-2


@pytest.mark.parametrize("optimizer", [AdamConfig(), SGDConfig(momentum=0.9)])
def test_bf16_parameters_train(optimizer: Any) -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 1).bfloat16()
    strategy = place(model, SingleConfig(), torch.device("cpu"), PrecisionName.bf16_params)
    accumulator = Accumulator(model, build_optimizer(optimizer, model.parameters(), torch.device("cpu")))
    assert strategy.module is model
    losses = [_train(model, accumulator, [batch.bfloat16() for batch in BATCHES]).loss for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_skipped_window_leaves_no_nan_in_the_statistics() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), skip_nonfinite=True)
    batches = [torch.randn(4, 2, dtype=torch.float64), torch.full((4, 2), math.nan, dtype=torch.float64)]
    assert _train(model, accumulator, batches).skipped
    assert all(buffer.isfinite().all() for buffer in model.buffers())
    assert torch.equal(model[1].running_mean, torch.zeros(3, dtype=torch.float64))
    assert model[1].num_batches_tracked == 0, "which weighs the next mean, without a momentum"


def test_a_gradient_that_no_scale_mends_stops_a_float16_run() -> None:
    model, _ = _accumulator()
    model = model.float()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), scaler=scaler)

    def update() -> bool:
        with accumulator.window([torch.ones(2, 2)]) as micro_batches:
            for batch in micro_batches:
                outputs = model(batch)
                accumulator.backward(outputs.sum() + (outputs * 0).sqrt().sum(), len(batch))
        return accumulator.step().skipped

    assert [update(), update(), update()] == [True, True, True]  # scales 4, 2 and 1
    for _ in range(2):  # and an own loop that goes on is told again
        with pytest.raises(UserError, match="the norm of the gradient is"):
            update()


def test_a_weight_may_be_a_tensor_of_any_kind() -> None:
    model, accumulator = _accumulator()
    with accumulator.window(BATCHES) as micro_batches:
        for number, batch in enumerate(micro_batches):
            weight = (3, torch.tensor(1), torch.tensor(2.0, dtype=torch.float32))[number]
            accumulator.backward(model(batch).sum(), weight)
    assert accumulator.step().weight == 6.0


def test_flags_reports_and_times_of_micro_steps() -> None:
    model = nn.Linear(3, 1)
    asked: list[str] = []

    def answer(name: str, value: Any) -> Any:
        asked.append(name)
        return value

    accumulator = Accumulator(
        model,
        adamw(model),
        flags={"yes": lambda: answer("yes", True), "no": lambda: answer("no", False)},
        reports={"speed": lambda: answer("speed", 2.5), "load": lambda: answer("load", 0.25)},
        time_micro_steps=True,
    )
    with accumulator.window([torch.randn(4, 3) for _ in range(3)]) as micro_batches:
        for inputs in micro_batches:
            assert not asked, "asked once, at the end of the window"
            accumulator.backward(model(inputs).square().sum(), 4, {"own": torch.tensor([1.0, 2.0])})
    update = accumulator.step()
    assert asked == ["yes", "no", "speed", "load"]
    assert update.flags == {"yes"}
    assert update.reports == {"speed": (2.5,), "load": (0.25,)}
    assert update.sums["own"].tolist() == [3.0, 6.0]
    assert len(update.micro_seconds) == 3
    assert 0 < sum(update.micro_seconds) <= update.seconds


def test_a_parameter_without_a_part_in_a_window_goes_on_as_with_a_gradient_of_zero() -> None:
    """As under DDP, whose buckets keep gradients: momentum moves it on. One that never had a part stays."""
    parts = nn.ModuleDict({name: nn.Linear(2, 1, bias=False) for name in ("always", "once", "never")})
    optimizer = torch.optim.SGD(parts.parameters(), lr=0.1, momentum=0.5)
    accumulator = Accumulator(parts, optimizer)
    before = {name: part.weight.detach().clone() for name, part in parts.items()}
    for used in (("always", "once"), ("always",)):
        with accumulator.window([torch.ones(3, 2)]) as micro_batches:
            for batch in micro_batches:
                accumulator.backward(sum(parts[name](batch).sum() for name in used), len(batch))
        accumulator.step()
        assert all(parameter.grad is None for parameter in parts.parameters()), "no memory is held between windows"
    moved = {name: part.weight.detach() - before[name] for name, part in parts.items()}
    torch.testing.assert_close(moved["once"], torch.full((1, 2), -0.1 * (1 + 0.5)))
    assert not moved["never"].any()


def test_a_parameter_that_not_every_window_uses_is_decayed_alike_after_a_resume() -> None:
    """SGD without momentum keeps no state that would say that the parameter has been trained."""

    def parts() -> tuple[nn.ModuleList, Accumulator]:
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
        return model, Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1))

    def update(model: nn.ModuleList, accumulator: Accumulator, *used: int) -> None:
        with accumulator.window([torch.ones(3, 2)]) as micro_batches:
            for batch in micro_batches:
                accumulator.backward(sum(model[number](batch).sum() for number in used), len(batch))
        accumulator.step()

    model, accumulator = parts()
    update(model, accumulator, 0, 1)
    resumed, other = parts()
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(json.loads(json.dumps(accumulator.state_dict())))
    begun_anew, third = parts()
    begun_anew.load_state_dict(model.state_dict())
    for entry in ((model, accumulator), (resumed, other), (begun_anew, third)):
        update(*entry, 0)
    assert torch.equal(resumed[1].weight, model[1].weight)
    assert not torch.equal(begun_anew[1].weight, model[1].weight)
