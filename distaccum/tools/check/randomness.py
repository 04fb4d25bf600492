"""Experiments made twice: dropout, random data, the device's order of summing, and state that a forward changes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from distaccum.errors import listed
from distaccum.runtime.nested import tensors_of
from distaccum.tools.check.measuring import Update
from distaccum.tools.check.recording import Recording, agree, all_agree, described, first_parting
from distaccum.tools.check.report import Finding, Severity
from distaccum.tools.check.stillness import WideCasts
from distaccum.tools.check.subject import LOW_NOISES, Subject


def find_precision(subject: Subject, indices: Sequence[int]) -> Iterator[Finding]:
    """Finds models and losses that can't be computed in float64.

    Sets `subject.widens`, `subject.has_float64` and `subject.noise`.
    """
    probe, reason = _in_float64(subject, indices)
    outputs = [
        (call.name, output.dtype) for call in probe.calls for output in call.outputs if output.is_floating_point()
    ]
    name, low = max([*outputs, ("the task", probe.dtype)], key=lambda entry: torch.finfo(entry[1]).eps)
    if low not in LOW_NOISES:
        return
    subject.noise = LOW_NOISES[low]
    where, digits = described(subject.model, name), str(low).removeprefix("torch.")
    why = f"its output is {digits} although all of its inputs are float64"
    if reason:
        where, why = "the model", f"it can't be computed in float64 ({reason})"
    yield Finding(
        kind="low_precision",
        severity=Severity.info,
        what=f"The proof is as sharp as {digits} and no sharper: {why}.",
        where=where,
        remedy="Make tensors in the dtype of the inputs (x.new_zeros, torch.zeros_like, dtype=x.dtype) for a sharp "
        "proof. Training is not affected.",
    )


def _in_float64(subject: Subject, indices: Sequence[int]) -> tuple[Recording, str]:
    """Makes a forward in float64; or, where that is impossible, in the configured precision, and returns the reason."""
    try:
        with WideCasts() as casts:
            probe = subject.probe(indices)
            batch = subject.batch(indices)
            subject.backward(subject.output(subject.fresh_model(), subject.fresh_task(), batch).joined())
        subject.widens = casts.has_widened
        return probe, ""
    except Exception:
        pass  # something depends on the format that it casts to; any other reason comes up again below
    try:
        return subject.probe(indices), ""
    except RuntimeError as error:
        if "dtype" not in str(error) and "type" not in str(error):
            raise
        subject.has_float64 = False
        return subject.probe(indices), str(error).splitlines()[0]


def find_randomness(subject: Subject, indices: Sequence[int]) -> Iterator[Finding]:
    """Finds dropout and other draws, and sets `subject.is_random`; and forwards that differ without a draw."""
    first = subject.probe(indices)
    again = subject.probe(indices)
    others = [subject.probe(indices, seed=seed) for seed in (1, 2, 3)]
    other = next((probe for probe in others if probe.loss != first.loss), others[0])
    if not subject.close(first.loss, again.loss):
        name = first_parting(first.calls, again.calls, tolerance=subject.noise)
        if not all_agree(subject.batch(indices), subject.batch(indices)):
            name = "data.collate_fn"
        where = described(subject.model, name) if name is not None else "the task"
        yield Finding(
            kind="nondeterministic",
            because=f"{where} gives another result each time, with the same inputs, state and seeds",
            what="The same forward was run twice from the same state and seeds, and the loss differs beyond rounding.",
            where=where,
            remedy="Draw random numbers from torch's generator, which the run seeds; don't use the time, os.urandom or "
            "a generator of your own without a seed; keep state in buffers.",
        )
    elif first.loss != other.loss and not math.isnan(first.loss):
        subject.is_random = True
        still = [subject.probe(indices, seed=seed).loss for seed in (0, 1)]
        parting = first_parting(first.calls, other.calls)
        names = first.drawing_modules or ([parting] if parting is not None else ["the task"])
        how = "every draw replaced by its mean" if subject.close(*still) else "fixed seeds"
        yield Finding(
            kind="random_forward",
            severity=Severity.info,
            what="Another cut draws other random numbers, so its bits differ, as they do from seed to seed. The rest "
            f"was measured with {how}.",
            where=listed([described(subject.model, name) for name in names], 6),
            remedy="None needed. Set the probability of dropout to 0 if different cuts must give equal bits.",
        )


def find_random_data(subject: Subject, indices: Sequence[int]) -> Iterator[Finding]:
    """Finds datasets that return another sample each time for the same index."""
    for index in indices:
        first, again = subject.samples[index], subject.samples.load(index, repeat=1)
        if not _same(first, again):
            seeded = _same(first, subject.samples.load(index))
            where = f"data.train ({type(subject.samples.dataset).__name__}), sample {index}"
            what = (
                "It draws from the global generators. The loader seeds them for each sample with the run's seed, the "
                "epoch and the index, so the window is the same for every cut and after a resume."
                if seeded
                else f"Sample {index} differs when it is loaded twice with the same seeds: the dataset has a random "
                "state of its own. Its numbers then depend on the rank, the worker and the order of loading, so the "
                "window is not the same for every cut, nor after a resume."
            )
            yield Finding(
                kind="random_data",
                severity=Severity.info if seeded else Severity.warning,
                what=f"{what} The rest was measured with each sample loaded once.",
                where=where,
                remedy="None needed."
                if seeded
                else "Draw from torch, random or numpy.random, which the loader seeds for each sample; or seed the "
                "generator with the index and the epoch.",
            )
            return


def _same(one: object, other: object) -> bool:
    ours, theirs = tensors_of(one), tensors_of(other)
    if not ours and not isinstance(one, tuple | list | dict):
        return bool(torch.as_tensor(one == other).all())
    return len(ours) == len(theirs) and all(agree(a, b, 0.0) for a, b in zip(ours, theirs, strict=True))


def find_state(subject: Subject, indices: Sequence[int]) -> Iterator[Finding]:
    """Finds state that a forward changes, and whether the next forward depends on it."""
    model = subject.fresh_model()
    before = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    first = subject.probe(indices, model=model)
    second = subject.probe(indices, model=model)
    slope, slope_then = _gradient_norms(subject, indices)
    changed = [
        name
        for name, buffer in model.named_buffers()
        if not (name in before and agree(before[name], buffer, 0.0)) and not _is_batchnorm_statistic(model, name)
    ]
    matters = not (subject.close(first.loss, second.loss) and subject.close(slope, slope_then))
    if not matters and not changed:
        return
    parting = first_parting(first.calls, second.calls, tolerance=subject.noise)
    where = listed(changed, 6) if changed else described(subject.model, parting or "")
    if matters and parting is not None and changed:
        where += f", used by {described(subject.model, parting)}"
    if not matters:
        yield Finding(
            kind="state_in_forward",
            severity=Severity.info,
            what="A forward changes it; the loss doesn't depend on it. It will be another one for another number of "
            "micro-steps and ranks, in checkpoints and evaluations too.",
            where=where,
            remedy="If it counts or averages, count in samples or updates, not in forwards.",
        )
        return
    yield Finding(
        kind="state_in_forward",
        because=f"each forward changes {where}, and the next one depends on it",
        what="A forward changes it, and the same micro-batch then has another loss or gradient: relative changes of "
        f"{_change(first.loss, second.loss):.1e} and {_change(slope, slope_then):.1e}. Another cut has another number "
        "of forwards.",
        where=where,
        remedy="Change it once per update, after the optimizer's step, from the update's number or from sums over the "
        "window; or leave it alone in training.",
    )


def _change(before: float, after: float) -> float:
    return abs(after - before) / max(abs(before), abs(after), 1e-300)


def _gradient_norms(subject: Subject, indices: Sequence[int]) -> tuple[float, float]:
    """Returns the gradient's norm of a first and a second forward: sharper than the loss, which may be at an
    extremum."""
    model, task, norms = subject.fresh_model(), subject.fresh_task(), []
    for _ in range(2):
        model.zero_grad()
        loss_sum = subject.output(model, task, subject.batch(indices)).joined()
        if loss_sum.requires_grad:
            subject.backward(loss_sum)
        gradients = [parameter.grad.double() for parameter in model.parameters() if parameter.grad is not None]
        # Weighted unevenly: changes of two parameters could make up for each other.
        norms.append(sum(float(gradient.norm()) * (1 + index % 7) for index, gradient in enumerate(gradients)))
    return norms[0], norms[1]


def _is_batchnorm_statistic(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.modules.batchnorm._NormBase)


def find_lost_eval_mode(subject: Subject) -> Iterator[Finding]:
    """Finds modules that were built in evaluation mode, and that the training puts into training mode."""
    lost = [name for name in subject.woken if not list(subject.model.get_submodule(name).children())]
    if not lost:
        return
    where = listed([described(subject.model, name) for name in lost], 6)
    yield Finding(
        kind="eval_mode_lost",
        severity=Severity.info if "" in subject.woken else Severity.warning,  # a whole one: as pretrained models come
        what="It was built in evaluation mode, and the training begins with train(), which puts it into training mode: "
        "with dropout, and BatchNorm's statistics move.",
        where=where,
        remedy="If it is to stay frozen, set train.keep_modes=true, or override train() in your model: call "
        "super().train(mode), then .eval() on what is to stay.",
    )


def find_unequal_repeat(one: Update, again: Update) -> Iterator[Finding]:
    """Finds gradients whose bits differ when the same cut is computed twice."""
    names = [
        name
        for name, gradient in one.gradients.items()
        if not torch.equal(gradient, again.gradients.get(name, gradient))
    ]
    if names:
        yield Finding(
            kind="nondeterministic_bits",
            severity=Severity.info,
            what=f"The gradients of {len(names)} parameters differ in their last bits when the same cut is run twice "
            f"({', '.join(names[:3])}): the device adds in another order each time.",
            where=names[0],
            remedy="torch.use_deterministic_algorithms(True) gives the same bits; the update is right either way.",
        )
