"""Several losses in one window, each with its own denominator. On several ranks: tests/distributed/checks_terms.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

from distaccum import (
    Accumulator,
    LossTerm,
    NoiseScale,
    Recovery,
    TaskOutput,
    UpdateResult,
    UserError,
    WindowLoader,
    accumulate_coupled,
)
from distaccum.accumulation.terms import TermError

Batch = tuple[Tensor, Tensor, Tensor]
SHARE = 0.3


def samples(count: int = 13, labelled: float = 0.4) -> Batch:
    """Inputs, targets, and which samples have a second target."""
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(count, 3, dtype=torch.float64, generator=generator)
    return inputs, inputs.sin().sum(1), torch.rand(count, generator=generator) < labelled


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def sums_of(module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    inputs, targets, has = batch
    outputs = module(inputs)
    return (outputs[:, 0] - targets).square().sum(), (outputs[:, 1] - targets).abs()[has].sum()


def forward_of(module: nn.Module) -> Any:
    def forward(batch: Batch) -> TaskOutput:
        loss_sum, aux_sum = sums_of(module, batch)
        return TaskOutput(loss_sum, len(batch[0]), terms={"aux": LossTerm(aux_sum, batch[2].sum(), SHARE)})

    return forward


def counted(batch: Batch) -> dict[str, Any]:
    return {"main": len(batch[0]), "aux": batch[2].sum()}


def cut(batch: Batch, *sizes: int) -> list[Any]:
    return list(zip(*(tensor.split(list(sizes)) for tensor in batch), strict=True))


def one_shot(batch: Batch) -> tuple[float, Tensor]:
    """Loss and parameters after a step, in plain torch."""
    module = model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    loss_sum, aux_sum = sums_of(module, batch)
    count = int(batch[2].sum())
    loss = loss_sum / len(batch[0]) + (SHARE * aux_sum / count if count else 0.0)
    loss.backward()
    optimizer.step()
    return float(loss.detach()), flat(module)


def flat(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])


def updated(batches: Any, forward: Any = None, weights: Any = counted, **options: Any) -> tuple[UpdateResult, Tensor]:
    module = model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    accumulator = Accumulator(module, optimizer, weights=weights, **options)
    result = accumulator.run(batches, (forward or forward_of)(module))
    return result, flat(module)


@pytest.mark.parametrize("sizes", [(13,), (1,) * 13, (5, 1, 7), (2, 11)])
@pytest.mark.parametrize("labelled", [0.4, 0.0, 1.0])
def test_any_cut_is_one_shot(sizes: tuple[int, ...], labelled: float) -> None:
    batch = samples(labelled=labelled)
    loss, wanted = one_shot(batch)
    result, found = updated(cut(batch, *sizes))
    assert (found - wanted).norm() <= 1e-12 * wanted.norm()
    assert abs(result.loss - loss) <= 1e-12
    assert list(result.terms) == ["main", "aux"]
    assert math.isclose(result.terms["main"] + SHARE * result.terms["aux"], loss, rel_tol=1e-12)
    assert result.weight == 13
    if labelled == 0:
        assert result.terms["aux"] == 0


def test_the_wrong_formula_is_seen() -> None:
    """The mean over micro-batches of each one's own mean, as other trainers have it."""
    batch = samples()
    _, wanted = one_shot(batch)

    def means(module: nn.Module) -> Any:
        def forward(part: Batch) -> TaskOutput:
            loss_sum, aux_sum = sums_of(module, part)
            return TaskOutput(loss_sum / len(part[0]) + SHARE * aux_sum / part[2].sum().clamp(min=1), 1.0)

        return forward

    _, found = updated(cut(batch, 5, 1, 7), means, weights=None)
    assert (found - wanted).norm() > 1e-3 * wanted.norm()


def test_a_term_is_left_out_of_micro_steps_that_have_nothing_of_it() -> None:
    batch = samples()

    def sometimes(module: nn.Module) -> Any:
        def forward(part: Batch) -> TaskOutput:
            output = forward_of(module)(part)
            return output if part[2].any() else TaskOutput(output.loss_sum, output.weight)

        return forward

    _, found = updated(iter(cut(batch, *(1,) * 13)), sometimes)
    assert (found - one_shot(batch)[1]).norm() <= 1e-12


def test_only_a_further_term_has_elements() -> None:
    inputs, targets, has = samples()
    module = model()
    accumulator = Accumulator(
        module,
        torch.optim.SGD(module.parameters(), lr=0.1),
        weights=lambda part: {"main": 0, "aux": part[2].sum()},
    )
    with accumulator.window(cut((inputs, targets, has), 6, 7)) as parts:
        for part in parts:
            loss_sum, aux_sum = sums_of(module, part)
            accumulator.backward(loss_sum * 0, 0, terms={"aux": LossTerm(aux_sum, part[2].sum())})
    result = accumulator.step()
    wanted = model()
    mean = sums_of(wanted, (inputs, targets, has))[1] / has.sum()
    mean.backward()
    assert math.isclose(result.loss, float(mean.detach()), rel_tol=1e-12)
    assert (result.terms["main"], result.weight) == (0.0, 0.0)
    with torch.no_grad():
        for parameter in wanted.parameters():
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad
    assert (flat(module) - flat(wanted)).norm() <= 1e-12


def _dataset(count: int = 13) -> TensorDataset:
    return TensorDataset(*samples(count))


def test_windows_of_a_loader_and_memory_that_runs_out() -> None:
    """Micro-steps are taken again with smaller micro-batches: the denominators stay."""
    loader = WindowLoader(_dataset(), global_batch_size=13, micro_batch_size=6)
    window = next(iter(loader))
    order = [index for piece in window.sample_indices for index in piece]
    whole = tuple(tensor[order] for tensor in samples())
    _, wanted = one_shot(whole)  # type: ignore[arg-type]
    failures: Iterator[bool] = iter([False, True, False, True])

    def hungry(module: nn.Module) -> Any:
        class Fails(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, value: Tensor) -> Tensor:
                return value.clone()

            @staticmethod
            def backward(ctx: Any, *gradients: Tensor) -> Tensor:
                if next(failures, False):
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return gradients[0]

        def forward(part: Batch) -> TaskOutput:
            output = forward_of(module)(part)
            output.loss_sum = Fails.apply(output.loss_sum)  # type: ignore[no-untyped-call]
            return output

        return forward

    window = next(iter(loader))
    result, found = updated(window, hungry, recovery=Recovery())
    assert result.micro_steps > 3
    assert (found - wanted).norm() <= 1e-12 * wanted.norm()


def test_micro_batches_are_loaded_before_the_first_forward_and_once() -> None:
    loaded: list[int] = []

    class Noting(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            loaded.append(index)
            return super().__getitem__(index)

    seen = []

    def noting(module: nn.Module) -> Any:
        def forward(part: Batch) -> TaskOutput:
            seen.append(len(loaded))
            return forward_of(module)(part)

        return forward

    loader = WindowLoader(Noting(*samples()), global_batch_size=8, micro_batch_size=2)
    module = model()
    accumulator = Accumulator(module, torch.optim.SGD(module.parameters(), lr=0.1), weights=counted)
    for window in loader:
        accumulator.run(window, noting(module))
    assert seen == [8] * 4 + [13] * 3
    assert sorted(loaded) == list(range(13))


def test_it_works_with_scaler_noise_scale_and_skipping() -> None:
    batch = samples()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    _, wanted = one_shot(batch)
    result, found = updated(cut(batch, 5, 8), scaler=scaler)
    assert (found - wanted).norm() <= 1e-12 * wanted.norm()

    module = model()
    accumulator = Accumulator(
        module,
        torch.optim.SGD(module.parameters(), lr=0.1),
        weights=counted,
        noise_scale=NoiseScale(every_updates=1),
    )
    with accumulator.window(cut(batch, 5, 8)) as parts:
        for part in parts:
            output = forward_of(module)(part)
            accumulator.backward(output.loss_sum, output.weight, num_samples=len(part[0]), terms=output.terms)
    result = accumulator.step()
    pieces = []
    for part in cut(batch, 5, 8):  # gradients of the micro-steps' parts of the window's loss, times its weight
        other = model()
        loss_sum, aux_sum = sums_of(other, part)
        joined = loss_sum + SHARE * 13 / int(batch[2].sum()) * aux_sum
        pieces.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(joined, list(other.parameters()))]))
    both = float((pieces[0] + pieces[1]).square().sum())
    apart = sum(float(piece.square().sum()) for piece in pieces)
    assert accumulator.noise_scale is not None
    square = (both - apart) / (13**2 - 5**2 - 8**2)
    assert math.isclose(accumulator.noise_scale.gradient_square, square, rel_tol=1e-9)

    inputs, targets, has = batch
    broken = (inputs, targets.masked_fill(has, math.nan), has)
    before = flat(model())

    def of_aux(module: nn.Module) -> Any:
        def forward(part: Batch) -> TaskOutput:
            loss_sum, _ = sums_of(module, (part[0], part[1].nan_to_num(), part[2]))
            _, aux_sum = sums_of(module, part)
            return TaskOutput(loss_sum, len(part[0]), terms={"aux": LossTerm(aux_sum, part[2].sum(), SHARE)})

        return forward

    result, found = updated(cut(broken, 5, 8), of_aux, skip_nonfinite=True)
    assert result.skipped
    assert torch.equal(found, before)
    with pytest.raises(UserError, match=r"the loss is nan \(of its terms, aux"):
        updated(cut(broken, 5, 8), of_aux)


def _refused(match: str, forward: Any = None, weights: Any = counted, kind: type[Exception] = UserError) -> None:
    module = model()
    before = flat(module)
    accumulator = Accumulator(module, torch.optim.SGD(module.parameters(), lr=0.1), weights=weights)
    with pytest.raises(kind, match=match):
        accumulator.run(cut(samples(), 5, 8), (forward or forward_of)(module))
    accumulator.clear_gradients()
    assert torch.equal(flat(module), before)


def _with_term(**term: Any) -> Any:
    def of(module: nn.Module) -> Any:
        def forward(part: Batch) -> TaskOutput:
            loss_sum, aux_sum = sums_of(module, part)
            given = {"loss_sum": aux_sum, "weight": part[2].sum(), **{k: v(aux_sum, part) for k, v in term.items()}}
            return TaskOutput(loss_sum, len(part[0]), terms={"aux": LossTerm(**given)})

        return forward

    return of


def test_what_cannot_be_divided_is_refused() -> None:
    _refused(r"the term 'aux' has no denominator.*second buffer of gradients.*weights\(batch\)", weights=None)
    _refused("the term 'aux' has no denominator", weights=lambda part: {"main": len(part[0])})
    _refused(
        r"counted 13 elements of the loss 'aux' in the window, and its micro-steps gave the weight \d+\. .*not moved",
        weights=lambda part: {"main": len(part[0]), "aux": len(part[0])},
        kind=TermError,
    )
    _refused(
        "counted 39 elements of the loss 'main' in the window, and its micro-steps gave the weight 13",
        weights=lambda part: {"main": part[0].numel(), "aux": part[2].sum()},
    )
    _refused(
        "loss 'aux' has the weight 0 in the window, and its loss_sum is",
        _with_term(weight=lambda loss, part: 0),
        lambda part: {"main": len(part[0]), "aux": 0},
    )
    _refused("must return the weight of each loss by name, that of the main loss as 'main'; it returned a int",
        weights=lambda part: len(part[0]))  # fmt: skip
    _refused("it returned those of aux", weights=lambda part: {"aux": 1})
    _refused("counted main, aux in a micro-batch, and main in the one before",
        weights=lambda part: {"main": len(part[0])} | ({"aux": 1} if len(part[0]) == 8 else {}))  # fmt: skip
    _refused("counted a weight that is negative, infinite or NaN", weights=lambda part: {"main": 1, "aux": -1})
    _refused("the weight of 'aux' that weights.. returned is a Tensor of shape",
        weights=lambda part: {"main": 1, "aux": part[2]})  # fmt: skip
    _refused("'aux' has the coefficient 8 in a micro-step, and 5 in the one before",
        _with_term(coefficient=lambda loss, part: len(part[0])))  # fmt: skip
    _refused("a finite number as coefficient", _with_term(coefficient=lambda loss, part: math.inf))
    _refused("'aux' needs a scalar tensor with a gradient", _with_term(loss_sum=lambda loss, part: loss.detach()))
    _refused("'aux' needs a tensor as loss_sum", _with_term(loss_sum=lambda loss, part: 1.0))
    _refused("finite number of at least 0, as weight; got -1", _with_term(weight=lambda loss, part: -1))

    def named_main(module: nn.Module) -> Any:
        return lambda part: TaskOutput(
            sums_of(module, part)[0], len(part[0]), terms={"main": LossTerm(sums_of(module, part)[1], 1)}
        )

    _refused("has a term 'main', which is the name of the main loss", named_main)


def test_names_stay_the_same_from_window_to_window() -> None:
    module = model()
    names = iter(["aux", "aux", "other", "other"])
    accumulator = Accumulator(
        module,
        torch.optim.SGD(module.parameters(), lr=0.1),
        weights=lambda part: {"main": len(part[0]), next(names): 0},
    )
    batches = cut(samples(), 5, 8)
    accumulator.run(batches, lambda part: TaskOutput(sums_of(module, part)[0], len(part[0])))
    with pytest.raises(UserError, match="counted main, other, and main, aux in the window before"):
        accumulator.run(batches, lambda part: TaskOutput(sums_of(module, part)[0], len(part[0])))


def test_gradient_caching_refuses_terms() -> None:
    module = model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    batches = [part[0] for part in cut(samples(), 5, 8)]

    def loss(rows: Tensor) -> TaskOutput:
        return TaskOutput(rows.square().sum(), len(rows), terms={"aux": LossTerm(rows.sum(), len(rows))})

    with pytest.raises(UserError, match="gradient caching does not support terms"):
        accumulate_coupled(Accumulator(module, optimizer), batches, embed=module, loss=loss)
    with pytest.raises(UserError, match="gradient caching does not support terms"):
        accumulate_coupled(Accumulator(module, optimizer, weights=counted), batches, embed=module, loss=loss)


class _Waits(TorchDispatchMode):
    """Counts reads of tensors by the host."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._overloadpacket._qualified_op_name in ("aten::_local_scalar_dense", "aten::item")
        return func(*args, **(kwargs or {}))


def test_the_host_reads_no_more_tensors_than_without_terms() -> None:
    batch = samples()

    def without(module: nn.Module) -> Any:
        return lambda part: TaskOutput(sums_of(module, part)[0], len(part[0]))

    with _Waits() as several:
        updated(cut(batch, *(1,) * 13))
    with _Waits() as one:
        updated(cut(batch, *(1,) * 13), without, weights=None)
    assert several.count == one.count


def test_an_optimizer_that_evaluates_the_loss_itself() -> None:
    batch = samples()
    wanted = model()
    optimizer = torch.optim.LBFGS(wanted.parameters(), lr=0.5, max_iter=4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss_sum, aux_sum = sums_of(wanted, batch)
        loss = loss_sum / len(batch[0]) + SHARE * aux_sum / int(batch[2].sum())
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    module = model()
    accumulator = Accumulator(module, torch.optim.LBFGS(module.parameters(), lr=0.5, max_iter=4), weights=counted)
    result = accumulator.run(cut(batch, 5, 1, 7), forward_of(module))
    assert result.evaluations > 1
    assert list(result.terms) == ["main", "aux"]
    assert (flat(module) - flat(wanted)).norm() <= 1e-12 * flat(wanted).norm()
