"""Experiments on samples that are packed, put end to end in one row: whether they see each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distaccum.strategies import SingleStrategy
from distaccum.tools.check.recording import Call, Select, agree, described, differ
from distaccum.tools.check.report import Finding
from distaccum.tools.check.subject import Subject
from distaccum.training.packing import leak_of


def find_leaks(subject: Subject, indices: Sequence[int]) -> list[Finding]:
    """Finds samples that see each other when they are packed, and what else keeps them from being packed.

    Two samples are put side by side, and then with a third between them: what is computed for the tokens of the two
    must not move, and losses and weights must be the sums of each sample's alone. Besides, the examination is made that
    a training makes before its first update.

    Args:
        indices: of the samples in the dataset, at least one.
    """
    configured = subject.replaced(in_float64=False)
    strategy = SingleStrategy(configured.fresh_model())
    cuts, data = subject.loader.cuts, subject.samples.dataset
    reason = leak_of(configured.fresh_task(), data, cuts, strategy, subject.precision)
    first, last, between = (list(indices) * 3)[:3]
    packed = subject.as_trained()
    try:
        beside, apart = packed.probe([first, last]), packed.probe([first, between, last])
    except Exception as error:
        said = f"it can't compute packed samples ({type(error).__name__}: {error})"
        return [_finding(subject, reason or said, None)]
    alone = [subject.probe([index], record=False) for index in (first, last, between)]
    adds_up = all(
        subject.close(getattr(one, name), sum(getattr(sample, name) for sample in samples))
        for name in ("loss", "weight")
        for one, samples in ((beside, alone[:2]), (apart, alone))
    )
    calls = list(zip(beside.calls, apart.calls, strict=False))
    select = _tokens_of_both(subject, first, last, between)
    moving = [pair for pair in calls if pair[0].name == pair[1].name and differ(0, *pair, subject.noise, select)]
    if reason is None and adds_up and not any(mine.name == "" for mine, _ in moving):
        return []
    return [_finding(subject, reason, _first(subject, moving, select))]


def _first(subject: Subject, moving: Sequence[tuple[Call, Call]], select: Select) -> str | None:
    """Returns the first module that moves and whose floating-point inputs don't: positions that it is given, and masks,
    are part of what is wrong."""
    for mine, yours in moving:
        pairs = zip(mine.inputs, yours.inputs, strict=False)
        numbers = [select(0, *pair) or pair for pair in pairs if pair[0].is_floating_point()]
        if all(agree(*pair, subject.noise) for pair in numbers):
            return mine.name
    return None


def _tokens_of_both(subject: Subject, first: int, last: int, between: int) -> Select:
    """Returns a function that selects what belongs to the first and the last sample, of tensors that have a dimension
    of tokens or of samples: it is longer with a third sample between them."""
    lengths = subject.loader.cuts.lengths
    assert lengths is not None
    ahead, added, behind = (int(lengths[index]) for index in (first, between, last))
    kept = {
        (ahead + behind, ahead + added + behind): [*range(ahead), *range(ahead + added, ahead + added + behind)],
        (2, 3): [0, 2],
    }

    def select(_: int, beside: Tensor, apart: Tensor) -> tuple[Tensor, Tensor] | None:
        if beside.shape == apart.shape or beside.ndim != apart.ndim:
            return None
        for dim, sizes in enumerate(zip(beside.shape, apart.shape, strict=True)):
            if sizes in kept:
                apart = apart.index_select(dim, torch.tensor(kept[sizes], device=apart.device))
        return (beside, apart) if beside.shape == apart.shape else None

    return select


def _finding(subject: Subject, reason: str | None, module: str | None) -> Finding:
    refused = f"A training refuses it: {reason}."
    if reason is None:
        refused = "A training doesn't notice it, as it looks at the ends of two samples, and in its own precision."
    if module is None:
        return Finding(
            kind="packing_refused",
            because="batch=packed does not support this model and task",
            what=refused,
            where=f"{described(subject.model, '')}, {subject.task_name}",
            remedy="batch=by_length, which pads little and asks nothing of them.",
        )
    where = described(subject.model, module)
    return Finding(
        kind="packed_samples_meet",
        because=f"{where} does not keep packed samples apart",
        what="What it gives for the tokens of two samples changes when a third sample is put between them in the row. "
        + refused,
        where=where,
        remedy="Let positions begin anew with each sample, and attention stay inside it: position_ids or "
        "sample_lengths say where samples begin. Or batch=by_length, which pads little and asks nothing of the model.",
    )
