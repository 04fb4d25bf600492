"""Experiments on samples that depend on each other: sums of losses and weights that ought to add up, and don't."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distaccum.runtime.nested import leaves_of, number_of_rows
from distaccum.tasks import CoupledTask, TaskOutput
from distaccum.tools.check.numerics import find_nonfinite
from distaccum.tools.check.recording import (
    Call,
    Recording,
    agree,
    all_agree,
    all_tensors,
    described,
    differ,
    first_parting,
)
from distaccum.tools.check.report import Finding
from distaccum.tools.check.subject import RowsOfOne, Subject

NOT_OF_A_LOSS = {
    *("mixes_samples", "padding_dependence", "batch_size_dependence", "nonfinite"),
    *("collate_couples_samples", "random_collate"),
}
"""Kinds of findings that all losses of a task would have in common."""
_SIZE = 4
"""Samples in the micro-batch of A, B and their company."""
_OTHERS = (0, 2, 3)
"""Places in it of all but B: some before it and some after, for layers that look only one way."""


class Trio(NamedTuple):
    """Three samples and the company they are put in.

    The company holds the longest sample there is, so that all micro-batches of it are padded alike.
    """

    a: int
    b: int
    c: int
    company: list[int]


def choose_trio(subject: Subject, windows: Sequence[Sequence[int]]) -> Trio | None:
    """Chooses samples for the experiments from the first windows and, if those are small, from the rest of the data."""
    pool = list(dict.fromkeys([index for window in windows for index in window]))[:64]
    pool += [index for index in range(min(subject.loader.num_samples, 64)) if index not in pool]
    if subject.term:
        pool = [index for index in pool if subject.probe([index], record=False).loss != 0]
    if len(pool) < 5:
        return None
    by_size = sorted(pool[:64], key=subject.samples.size)
    small, company = by_size[:-2], by_size[-2:]
    # As different as can be: two equal samples in the roles of B and C would show nothing.
    first = small[0]
    others = [index for index in small[1:] if not all_agree(subject.batch([first]), subject.batch([index]))]
    return Trio(first, others[0], others[-1], company) if len(others) >= 2 else None


class _Sums(NamedTuple):
    """Properties of a sum (the loss, or the weight), by experiment."""

    additive: bool
    """f(A, B, …) + f(…) = f(A, …) + f(B, …), all padded alike."""
    doubles: bool
    """Every sample twice gives twice as much."""
    constant: bool
    """Every sample twice gives as much as once."""
    joins: bool
    """A short sample and a long one together give the sum of each alone, with no padding."""


def find_coupling(subject: Subject, trio: Trio) -> list[Finding]:
    """Finds layers that mix samples, losses that couple them, means instead of sums, weights that don't add up."""
    if isinstance(subject.task, CoupledTask):
        # Its loss may couple samples, and its embeddings may not.
        subject = subject.replaced(task=_SummedEmbeddings(subject.task))
    company = trio.company
    everyone = [trio.a, trio.b, trio.c, *company]
    if findings := _collation(subject, trio):
        rows = RowsOfOne(subject.samples, everyone)
        if not any(tensor.shape[:1] == (1,) for tensor in all_tensors(rows.batch([trio.a], None))):
            return findings  # what is collated can't be taken apart
        subject = subject.replaced(samples=rows)
    if not math.isfinite(subject.probe(everyone, record=False).loss):
        return [*findings, find_nonfinite(subject, everyone)]
    probes = {
        "both": subject.probe([trio.a, trio.b, *company]),
        "other": subject.probe([trio.a, trio.c, *company]),
        "larger": subject.probe([trio.a, trio.b, trio.c, *company]),
        "a": subject.probe([trio.a, *company], record=False),
        "b": subject.probe([trio.b, *company], record=False),
        "none": subject.probe(company, record=False),
        "twice": subject.probe([trio.a, trio.b, *company] * 2, record=False),
    }
    with suppress(ValueError, RuntimeError):  # the model may refuse a single sample
        short, long = [trio.a], [trio.company[-1]]
        probes |= {
            "short": subject.probe(short, record=False),
            "long": subject.probe(long, record=False),
            "short and long": subject.probe(short + long, record=False),
        }
    losses, weights = (_sums(subject, probes, name) for name in ("loss", "weight"))
    module, root_moves = _mixing_module(subject, probes)
    outputs_move = module is not None and (root_moves or not losses.additive)
    if module is not None and outputs_move:
        findings.append(_mixing(subject.model, module))
    if losses.constant and probes["both"].loss != 0:
        findings.append(_mean_loss(subject, probes["both"].loss, probes["twice"].loss))
    elif not losses.additive and not outputs_move:
        findings.append(_coupled_loss(subject, probes))
    elif losses.additive and not losses.doubles:
        findings.append(_constant_term(subject, probes))
    elif losses.additive and not losses.joins:
        findings.append(_padding(subject, trio))
    if not (weights.additive and weights.doubles and weights.joins) and not losses.constant:
        findings.append(_weight(subject, probes))
    return findings


class _SummedEmbeddings:
    """A task whose loss is a sum over samples of a function of each one's embedding."""

    def __init__(self, task: CoupledTask) -> None:
        self._task = task

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        embeddings = self._task.embed(model, batch)
        parts = [leaf.sin().sum() for leaf in leaves_of(embeddings) if leaf.requires_grad]
        return TaskOutput(torch.stack(parts).sum(), number_of_rows(embeddings))


def _sums(subject: Subject, probes: dict[str, Recording], which: str) -> _Sums:
    value: dict[str, float] = {name: getattr(probe, which) for name, probe in probes.items()}
    sizes = value.values()
    has_joined = "short and long" in value
    return _Sums(
        additive=subject.close(value["both"] + value["none"], value["a"] + value["b"], *sizes),
        doubles=subject.close(value["twice"], 2 * value["both"], *sizes),
        constant=subject.close(value["twice"], value["both"], *sizes),
        joins=not has_joined or subject.close(value["short and long"], value["short"] + value["long"], *sizes),
    )


def _rows(
    calls: Sequence[Call], larger: Sequence[Call], size: int, kept: Sequence[int]
) -> Callable[[int, Tensor], Tensor | None]:
    """Returns a function that selects the part of a tensor that belongs to some samples, by their places.

    The dimension of the samples is the one that grows with the micro-batch, in a recording of one sample more.
    """
    growing: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}
    for number, (call, bigger) in enumerate(zip(calls, larger, strict=False)):
        if call.name != bigger.name:
            break
        pairs = zip([*call.inputs, *call.outputs], [*bigger.inputs, *bigger.outputs], strict=False)
        for small, large in pairs:
            for dim, (before, after) in enumerate(zip(small.shape, large.shape, strict=False)):
                if before % size == 0 and after == before // size * (size + 1):
                    growing.setdefault((number, tuple(small.shape)), (dim, before // size))
                    break

    def rows(number: int, tensor: Tensor) -> Tensor | None:
        found = growing.get((number, tuple(tensor.shape)))
        if found is None:
            return None
        dim, each = found
        return torch.cat([tensor.narrow(dim, place * each, each) for place in kept], dim)

    return rows


def _mixing_module(subject: Subject, probes: dict[str, Recording]) -> tuple[str | None, bool]:
    """Returns the first module that changes other samples' rows when B is replaced, and whether the outputs change."""
    both, other, larger = (probes[name].calls for name in ("both", "other", "larger"))
    rows = _rows(both, larger, _SIZE, _OTHERS)

    def select(number: int, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor] | None:
        mine, yours = rows(number, left), rows(number, right)
        return None if mine is None or yours is None else (mine, yours)

    root_moves = any(
        mine.name == yours.name == "" and differ(number, mine, yours, subject.noise, select)
        for number, (mine, yours) in enumerate(zip(both, other, strict=False))
    )
    return first_parting(both, other, tolerance=subject.noise, select=select), root_moves


def _collation(subject: Subject, trio: Trio) -> list[Finding]:
    """Finds collate functions that change other samples' rows when B is replaced, or draw random numbers."""

    def tensors(*indices: int, draw: int = 0) -> list[Tensor]:
        return all_tensors(subject.samples.batch([*indices, *trio.company], None, draw))

    larger, mixes = tensors(trio.a, trio.b, trio.c), False
    for draw in range(4):  # one that mixes samples at random may leave B alone
        ours, theirs = tensors(trio.a, trio.b, draw=draw), tensors(trio.a, trio.c, draw=draw)
        for mine, yours, more in zip(ours, theirs, larger, strict=False):
            has_rows = mine.shape[:1] == (_SIZE,) and more.shape[:1] == (_SIZE + 1,) and mine.shape == yours.shape
            mixes |= has_rows and not agree(mine[list(_OTHERS)], yours[list(_OTHERS)], 0.0)
    if not mixes and all_agree(tensors(trio.a), tensors(trio.a, draw=1)):
        return []
    does = "mixes the samples of a micro-batch" if mixes else "draws random numbers, others for another cut"
    return [
        Finding(
            kind="collate_couples_samples" if mixes else "random_collate",
            because=f"the collate function {does}",
            what="A sample's own row in the micro-batch changes when another sample is replaced."
            if mixes
            else "The same samples make another micro-batch with another seed, and the seed follows the first of them.",
            where="data.collate_fn, or the dataset's collate_fn",
            remedy="Do what draws or looks at several samples before the windows are cut, in the dataset, whose draws "
            "are seeded sample by sample: normalise with statistics of the whole of it; for mixup and CutMix, let each "
            "sample draw its partner there, as distaccum.data.Mixed does (task=classification takes its targets).",
        )
    ]


def _mixing(model: nn.Module, name: str) -> Finding:
    where = described(model, name)
    module = model.get_submodule(name) if name else model
    is_batchnorm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    if is_batchnorm:
        others = [other for other, m in model.named_modules() if isinstance(m, type(module)) and other != name]
        more = f", as with {len(others)} more of its kind" if others else ""
        remedy = (
            "GroupNorm or LayerNorm (torch.nn.GroupNorm(groups, channels)) takes its statistics from one sample: exact "
            "for every cut. Frozen statistics (keep the layer in eval mode by overriding train()) are exact too, and "
            "fit a pretrained model. SyncBatchNorm (strategy.sync_batchnorm=true, CUDA only) makes one micro-step's "
            "statistics the same over the ranks, so ranks no longer matter, but micro-steps still do."
        )
        what = f"Its statistics are those of the micro-batch{more}."
    elif isinstance(module, nn.MultiheadAttention | nn.RNNBase) and not module.batch_first:
        what = "It was built with batch_first=False, and its inputs have the samples in the first dimension."
        remedy = "Build it (and the layers around it) with batch_first=True, or transpose its inputs."
    else:
        what = "It looks across the samples of the micro-batch."
        remedy = (
            "Let it compute each sample by itself: statistics over the features of one sample, or running statistics "
            "that are not updated; mind the dimension of the samples in sums, means, softmax, permutations and views."
        )
    return Finding(
        kind="mixes_samples",
        because=f"{where} mixes the samples of a micro-batch",
        what=f"What it gives for one sample changes when another sample of the micro-batch is replaced. {what}",
        where=where,
        remedy=remedy,
    )


def _mean_loss(subject: Subject, once: float, twice: float) -> Finding:
    where = subject.task_name
    return Finding(
        kind="mean_loss",
        because=f"the {where} returns a mean where a sum is asked",
        what=f"loss_sum is {once:.6g} for a micro-batch, and {twice:.6g} when every sample of it is taken twice.",
        where=where,
        remedy='Return the sum as loss_sum (reduction="sum"), and as weight the number of elements summed. Windows are '
        "divided by the total weight once, at their end.",
    )


def _coupled_loss(subject: Subject, probes: dict[str, Recording]) -> Finding:
    where = subject.task_name
    whole = probes["both"].loss + probes["none"].loss
    parts = probes["a"].loss + probes["b"].loss
    return Finding(
        kind="loss_couples_samples",
        because=f"the loss of the {where} couples the samples of a micro-batch",
        what="The model's outputs for a sample don't depend on the others, but the loss does: sums over micro-batches "
        f"that hold the same samples are {whole:.6g} and {parts:.6g}, {abs(whole - parts):.2g} apart.",
        where=where,
        remedy="A ratio of sums (Dice, F1), a loss over pairs (contrastive) or a batch statistic has no sum over "
        "samples. Gradient caching makes it exact for any cut, in one more forward: a function of sums over the window "
        "as a subclass of distaccum.SumsTask with sums and loss (Dice: task=dice), any function of the samples' "
        "embeddings as a subclass of distaccum.CoupledTask with embed and window_loss (task=contrastive), and in a "
        "loop of your own distaccum.accumulate_coupled. Or make it a sum: the mean of each sample's own ratio, its own "
        "negatives; or, where the denominator has no gradient, the numerator as loss_sum and the denominator as "
        "weight.",
    )


def _constant_term(subject: Subject, probes: dict[str, Recording]) -> Finding:
    where = subject.task_name
    constant = 2 * probes["both"].loss - probes["twice"].loss
    return Finding(
        kind="loss_constant_term",
        because=f"the loss of the {where} has a term that is added once per micro-batch",
        what=f"Every sample taken twice gives twice the loss, less {constant:.6g}: that much comes with each "
        "micro-batch, whatever its size.",
        where=where,
        remedy="A penalty on the parameters belongs into the optimizer (optim.weight_decay), or must be multiplied by "
        "the micro-batch's weight, so that its sum over the micro-batches doesn't depend on how many there are.",
    )


def _padding(subject: Subject, trio: Trio) -> Finding:
    """Finds the first module that treats a short sample differently when it is padded to a long one's length."""
    short = subject.probe([trio.a])
    padded = subject.probe([trio.a, trio.company[-1]])
    larger = subject.probe([trio.a, trio.company[-1], trio.company[0]])
    rows = _rows(padded.calls, larger.calls, 2, (0,))

    def unpadded(number: int, alone: Tensor, tensor: Tensor) -> tuple[Tensor, Tensor] | None:
        row = rows(number, tensor)
        if row is None:
            return None
        if row.ndim == alone.ndim:
            row = row[tuple(slice(size) for size in alone.shape)]
        return alone, row

    module = first_parting(short.calls, padded.calls, tolerance=subject.noise, select=unpadded)
    is_ragged = subject.samples.size(trio.a) != subject.samples.size(trio.company[-1])
    where = described(subject.model, module) if module is not None else subject.task_name
    if not is_ragged:
        return Finding(
            kind="batch_size_dependence",
            because=f"{where} computes another thing when the micro-batch has another size",
            what="Two samples of one shape have another loss together than the sum of each alone.",
            where=where,
            remedy="Look for squeeze() without a dimension, for broadcasting between samples, and for code that asks "
            "how many samples there are.",
        )
    return Finding(
        kind="padding_dependence",
        because=f"the result for a sample depends on how far it is padded, from {where} on",
        what="A short sample's loss changes when it is padded to the length of a longer one, though no layer mixes "
        "samples. Another cut pads it to another length.",
        where=where,
        remedy="Mask the padding: key_padding_mask in attention, a mask in means and pools over the length, a target "
        "that the loss ignores (ignore_index) and doesn't count in the weight. Or pad all samples to one length.",
    )


def _weight(subject: Subject, probes: dict[str, Recording]) -> Finding:
    where = f"weight of the {subject.task_name}"
    value = {name: probe.weight for name, probe in probes.items()}
    what = f"It is {value['both']:.12g} for a micro-batch, and {value['twice']:.12g} when every sample is taken twice."
    if subject.close(value["twice"], 2 * value["both"]) and "short" in value:
        what = (
            f"It is {value['short']:.12g} for one sample, {value['long']:.12g} for a longer one, and "
            f"{value['short and long']:.12g} for both together: padding is counted."
        )
    return Finding(
        kind="wrong_weight",
        because=f"the {where} of a micro-batch is not the sum of its parts' weights",
        what=what,
        where=where,
        remedy="Return the number of elements that loss_sum is the sum of: samples, or valid targets without padding "
        "((targets != ignore_index).sum()).",
    )
