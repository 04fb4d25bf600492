"""Losses that couple a window's samples, in one process. On ranks: distributed/checks_caching.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from coupled import FEATURES, Embedder, Pairs, one_shot, train_pairs
from examples import curves, distance, flat
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from distaccum import Accumulator, TaskOutput, UserError, WindowLoader, accumulate_coupled
from distaccum.accumulation.gradient_caching import Stage
from distaccum.config import DPConfig
from distaccum.runtime.nested import mapped
from distaccum.runtime.randomness import GlobalStates
from distaccum.tasks import Contrastive

TASK = Contrastive(temperature=0.3)


@settings(deadline=None, max_examples=15, derandomize=True, database=None)
@given(
    global_batch_size=st.integers(2, 20),
    micro_batch_size=st.integers(1, 6),
    samples=st.integers(20, 45),
    seed=st.integers(0, 99),
)
def test_any_cut_is_one_shot(global_batch_size: int, micro_batch_size: int, samples: int, seed: int) -> None:
    options: dict[str, Any] = {"global_batch_size": global_batch_size, "data": Pairs(samples), "seed": seed}
    wanted, wanted_parameters = one_shot(updates=4, **options)
    found, parameters = train_pairs(None, updates=4, micro_batch_size=min(micro_batch_size, samples), **options)
    for mine, reference in zip(curves(found), curves(wanted), strict=True):
        assert distance(mine, reference) < 1e-12
    assert distance(parameters, wanted_parameters) < 1e-12
    assert [(result.weight, result.sums) for result in found] == [(result.weight, result.sums) for result in wanted]


def test_plain_accumulation_misses() -> None:
    """The negative control."""
    wanted, wanted_parameters = one_shot()
    found, parameters = train_pairs(None, plain=True, micro_batch_size=4)
    assert distance(curves(found)[0], curves(wanted)[0]) > 1e-2
    assert distance(parameters, wanted_parameters) > 1e-2


@pytest.mark.parametrize("replicas", [2, 3])
def test_data_parallel(replicas: int) -> None:
    _, wanted = one_shot()
    _, parameters = train_pairs(DPConfig(replicas=replicas), micro_batch_size=5)
    assert distance(parameters, wanted) < 1e-12


def test_cut_by_length() -> None:
    """Samples then come in another order than the window's."""
    lengths = [1 + index % 5 for index in range(41)]
    _, wanted = one_shot()
    found, parameters = train_pairs(None, micro_batch_size=3, lengths=lengths)
    assert max(result.micro_steps for result in found) > 3
    assert distance(parameters, wanted) < 1e-12


def _held(count: int = 3, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    data = Pairs()
    return [
        (data.views[start : start + size], data.labels[start : start + size]) for start in range(0, count * size, size)
    ]


def _accumulator(model: nn.Module, **options: Any) -> Accumulator:
    return Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


def _update(
    model: nn.Module, window: Any, *, embed: Callable[[Any], Any] | None = None, loss: Any = None, **options: Any
) -> Accumulator:
    accumulator = _accumulator(model, **options)
    accumulate_coupled(
        accumulator, window, embed=embed or (lambda batch: TASK.embed(model, batch)), loss=loss or TASK.window_loss
    )
    return accumulator


def _graph_of_all(model: nn.Module, batches: list[Any]) -> TaskOutput:
    """The loss of a window, whose micro-batches are embedded one after the other with all their graphs kept."""
    rows = [TASK.embed(model, batch) for batch in batches]
    return TASK.window_loss({key: torch.cat([row[key] for row in rows]) for key in rows[0]})


def test_dropout_is_replayed() -> None:
    model, twin = Embedder(dropout=0.4), Embedder(dropout=0.4)
    torch.manual_seed(1)
    output = _graph_of_all(twin, _held())
    after = torch.rand(3)
    (output.loss_sum / output.weight).backward()
    torch.manual_seed(1)
    accumulator = _update(model, _held())
    assert torch.equal(torch.rand(3), after), "as if each micro-batch had been embedded once"
    update = accumulator.step()
    assert distance(update.loss, output.loss_sum.detach() / output.weight) < 1e-12
    gradients = torch.cat([p.grad.reshape(-1) for p in twin.parameters() if p.grad is not None])
    assert distance(flat(model), flat(twin) - 0.1 * gradients) < 1e-12


def test_without_replay_dropout_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the one above."""
    found = []
    for replays in (True, False):
        if not replays:
            monkeypatch.setattr(GlobalStates, "put_back", lambda self: None)
        model = Embedder(dropout=0.4)
        torch.manual_seed(1)
        _update(model, _held()).step()
        found.append(flat(model))
    assert distance(found[1], found[0]) > 1e-3


def test_buffers_change_once() -> None:
    def build() -> nn.Module:
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).double()

    model, twin = build(), build()
    _graph_of_all(twin, _held())
    _update(model, _held()).step()
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    assert int(model[1].num_batches_tracked) == 3  # type: ignore[index]


def test_a_window_of_one_micro_batch_is_embedded_once() -> None:
    calls = []

    def embed(batch: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return TASK.embed(model, batch)

    model = Embedder(dropout=0.4)
    torch.manual_seed(1)
    twin = copy.deepcopy(model)
    output = TASK(twin, _held(1)[0])
    after = torch.rand(3)
    torch.manual_seed(1)
    update = _update(model, _held(1), embed=embed).step()
    assert calls == [True]
    assert distance(update.loss, output.loss_sum.detach() / output.weight) < 1e-12
    assert torch.equal(torch.rand(3), after)
    calls.clear()
    _update(model, _held(2), embed=embed).step()
    assert calls == [False, False, True, True]


def test_a_learned_temperature_gets_its_gradient() -> None:
    options: dict[str, Any] = {"model": lambda: Embedder(learn_temperature=True), "task": Contrastive(temperature=None)}
    _, wanted = one_shot(**options)
    _, parameters = train_pairs(None, micro_batch_size=3, **options)
    assert distance(parameters, wanted) < 1e-12
    assert float(parameters[-1]) != 1.0


def test_embeddings_of_any_form() -> None:
    """Two towers, as in CLIP, in a tuple."""

    def loss(embeddings: tuple[Tensor, Tensor]) -> TaskOutput:
        left, right = embeddings
        logits = left @ right.T
        places = torch.arange(len(left))
        return TaskOutput(nn.functional.cross_entropy(logits, places, reduction="sum"), len(left))

    models = [nn.ModuleList([Embedder(), nn.Linear(FEATURES, 4).double()]) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, window in zip(models, (_held(3), _held(1, 12)), strict=True):

        def embed(batch: Any, model: Any = model) -> Any:
            return model[0](batch[0][:, 0]), model[1](batch[0][:, 1])

        _update(model, window, embed=embed, loss=loss).step()
    assert distance(flat(models[0]), flat(models[1])) < 1e-12


def test_autocast_around_everything_loses_no_gradient() -> None:
    """Autocast keeps weights that it has cast, and those cast without a graph have none."""
    found = []
    for enabled in (False, True):
        model = Embedder().float()
        before = flat(model)
        held = [(views.float(), labels) for views, labels in _held()]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            accumulator = _update(model, held)
        accumulator.step()
        found.append(flat(model) - before)
    assert (found[1] != 0).float().mean() > 0.9
    assert distance(found[1], found[0]) < 5e-2


def test_float16_with_a_scaler() -> None:
    """The cached gradients are float32: unscaled, float16 would have no room for them."""
    found = []
    for scaled in (False, True):
        model = Embedder().float()
        before = flat(model)
        held = [(views.float(), labels) for views, labels in _held()]
        seen = []

        def embed(batch: Any, model: nn.Module = model, scaled: bool = scaled, seen: list[Any] = seen) -> Any:
            with torch.autocast("cpu", torch.float16, enabled=scaled):
                rows = TASK.embed(model, batch)
            seen.append(rows["views"].dtype)
            return {"views": rows["views"].half() if scaled else rows["views"]}

        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12) if scaled else None
        update = _update(model, held, embed=embed, scaler=scaler).step()
        assert not update.skipped
        found.append(flat(model) - before)
    assert distance(found[1], found[0]) < 1e-2


def test_the_time_of_the_first_pass_counts() -> None:
    import time

    def embed(batch: Any) -> Any:
        if not torch.is_grad_enabled():
            time.sleep(0.02)
        return TASK.embed(model, batch)

    def slow() -> Any:
        for batch in _held():
            time.sleep(0.02)
            yield batch

    model = Embedder()
    update = _update(model, slow(), embed=embed).step()
    assert update.seconds > 0.12
    assert 0.06 < update.data_seconds < update.seconds - 0.05


def test_what_comes_next_is_told_and_may_end_the_window() -> None:
    told: list[tuple[Stage, int]] = []
    model = Embedder()
    accumulator = _accumulator(model)

    def between(stage: Stage, step: int) -> None:
        told.append((stage, step))
        if len(told) == 3 and not told[0][1] == 0:
            raise KeyError

    def go(listener: Any) -> None:
        accumulate_coupled(
            accumulator,
            _held(2),
            embed=lambda batch: TASK.embed(model, batch),
            loss=TASK.window_loss,
            between=listener,
        )

    with pytest.raises(KeyError):
        go(between)
    told.clear()
    go(lambda stage, step: told.append((stage, step)))
    accumulator.step()
    assert told == [
        (Stage.embedding, 1),
        (Stage.embedding, 2),
        (Stage.whole_window, 2),
        (Stage.forward, 1),
        (Stage.backward, 1),
        (Stage.forward, 2),
        (Stage.last_backward, 2),
    ]


def _with_own_parameter(embeddings: Any) -> TaskOutput:
    own = nn.Parameter(torch.ones((), dtype=torch.float64))
    return TaskOutput((own * embeddings["views"]).sum(), 1)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    ("embed", "loss", "message"),
    [
        (None, lambda rows: rows["views"].sum(), "returned a Tensor, not a distaccum.TaskOutput"),
        (None, lambda rows: TaskOutput(rows["views"].sum(dim=0), 1), "must be a scalar tensor with a gradient"),
        (None, lambda rows: TaskOutput(rows["views"].detach().sum(), 1), "requires_grad=False"),
        (None, _with_own_parameter, r"depends on a parameter of its own, of shape \[\]"),
        (lambda batch: {"views": batch[0].sum()}, None, r"one row for each sample.*got shapes \[\]"),
        (lambda batch: (batch[0], batch[1][:1]), None, r"got shapes \[4, 2, 6\], \[1\]"),
        (lambda batch: 3, None, "got a int"),
        (lambda batch: {"views": batch[0]}, None, "the embeddings have no gradient"),
    ],
)
def test_what_is_refused(embed: Any, loss: Any, message: str, count: int) -> None:
    with pytest.raises(UserError, match=message):
        _update(Embedder(), _held(count), embed=embed, loss=loss)


def test_embeddings_that_are_nan_are_told_where_they_are() -> None:
    held = _held()
    held[1][0][0] = torch.nan
    with pytest.raises(UserError, match=r"the loss is nan \(rank 0, micro-step 2\)"):
        _update(Embedder(), held).step()


def test_a_loss_that_is_nan_by_itself() -> None:
    def loss(rows: Any) -> TaskOutput:
        return TaskOutput(rows["views"].sum() * torch.nan, 1)

    with pytest.raises(UserError, match=r"the loss is nan \(rank 0, micro-step 1\)"):
        _update(Embedder(), _held(), loss=loss).step()


def test_an_update_that_is_skipped_leaves_nothing_behind() -> None:
    held = _held()
    held[1][0][0] = torch.nan
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).double()
    before = copy.deepcopy(model.state_dict())
    assert _update(model, held, skip_nonfinite=True).step().skipped
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if value.is_floating_point())


def test_unequal_micro_steps_are_refused_before_anything_is_embedded() -> None:
    model = Embedder()
    accumulator = _accumulator(model)
    accumulator.strategy.equal_micro_steps = True  # type: ignore[misc]
    window = next(iter(WindowLoader(Pairs(), global_batch_size=16, micro_batch_size=3, rank=0, world_size=2)))
    with pytest.raises(UserError, match="equal_micro_steps=True"):
        accumulate_coupled(accumulator, window, embed=pytest.fail, loss=TASK.window_loss)


def test_a_window_of_nothing() -> None:
    with pytest.raises(RuntimeError, match="the window has no micro-batch"):
        _update(Embedder(), [])


def test_nests_keep_their_form() -> None:
    nest = {"a": (torch.ones(2), [torch.zeros(3)])}
    assert mapped(nest, len) == {"a": (2, [3])}
