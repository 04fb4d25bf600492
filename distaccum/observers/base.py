"""The records that observers get, and the methods that get them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import nn

    from distaccum.accumulation.result import UpdateResult

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStart:
    """Reported once, before the first update."""

    run_dir: Path | None
    """Folder for all that the run writes, if there is one."""
    plan: str
    """One line that explains how a window is cut."""
    total_updates: int
    """Number of the last update of the run, unless it stops early, or windows grow or shrink with the noise scale."""
    updates_per_epoch: int | None
    """None if they are not equally many in all epochs."""
    config: dict[str, Any]
    """The configuration as plain dictionaries, lists, strings and numbers."""
    subject: str = ""
    """The classes of the model and of the training data, as they were built: `CNN on Digits`."""
    resumed_update: int = 0
    """Updates done before, by the run that this one goes on from; 0 for a new run."""
    skipped_updates: int = 0
    """Updates among these whose optimizer step was skipped."""


class _OfResult(Generic[T]):
    """An attribute of an `UpdateRecord` that is the field of the same name of its `result`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, record: UpdateRecord, owner: type) -> T:
        value: T = getattr(record.result, self._name)
        return value


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateRecord:
    """Reported after each update. Counts and means run over all ranks."""

    result: UpdateResult
    """The result of the accumulator, as it returned it."""
    update: int
    """Number of the update, from 1."""
    epoch: int
    """Number of the epoch that its window belongs to, from 0."""
    samples: int
    """Samples trained on since the start of the run, this window included."""
    window_samples: int
    """Samples of this window, over all ranks."""
    lr: float
    """Learning rate of the first parameter group: of all parameters that no other group has, if there are any."""
    group_lrs: dict[str, float] = field(default_factory=dict)
    """Learning rate of each parameter group by its name; empty if there is one group."""
    metrics: dict[str, float]
    """The task's metrics over the window (`accuracy`, …)."""
    layers: dict[str, dict[str, float]] | None = None
    """`grad_norm` and `update_ratio` of each block of the model, by its name (`insight.layers`); None in updates in
    which they are not measured."""
    compile_seconds: float = 0.0
    """Part of `update_seconds` that rank 0 spent compiling."""
    data_wait: float = 0.0
    """Part of the last seconds that the rank which waits longest for data has waited, if it is more than a tenth and
    something would help; else 0."""
    peak_memory_bytes: int | None = None
    """This rank's highest point so far: device memory on CUDA, resident set on CPU. Looked up at updates 1, 2, 4, 8, …
    and each hundredth; None at the others."""

    loss = _OfResult[float]()
    """Mean loss over the window: Σ loss_sum / Σ weight over all micro-steps and ranks; with terms, Σ coefficient · mean
    over all of them."""
    terms = _OfResult[dict[str, float]]()
    """Mean of each loss, where a task has several; else empty."""
    grad_norm = _OfResult[float]()
    """Norm of the window's mean gradient before clipping, over all parameters together."""
    group_norms = _OfResult[dict[str, float]]()
    """The same of each parameter group by its name; empty if there is one group."""
    micro_steps = _OfResult[int]()
    """Micro-steps of this rank; rank 0 never has fewer than another."""
    weight = _OfResult[float]()
    """Σ weight: samples, valid tokens, pixels."""
    sync_calls = _OfResult[int]()
    """Collectives that carried gradients."""
    sync_bytes = _OfResult[int]()
    """Bytes that this rank handed to them."""
    data_seconds = _OfResult[float]()
    """Part of `update_seconds` spent waiting for micro-batches."""
    sync_seconds = _OfResult[float]()
    """Part of `update_seconds` spent waiting for the network and for the other ranks."""
    evaluations = _OfResult[int]()
    """How often the optimizer has had the window evaluated: once, unless it evaluates the loss itself."""
    noise_scale = _OfResult[float | None]()
    """Gradient noise scale in samples, smoothed; infinite while the gradient can't be distinguished from noise. None in
    updates in which it is not measured, as the two after it."""
    noise_scale_error = _OfResult[float | None]()
    """Standard error of it; infinite while there is one measurement."""
    coherence = _OfResult[float | None]()
    """Mean pairwise inner product of this window's micro-gradients over their mean square."""
    skipped = _OfResult[bool]()
    """True when the optimizer did not step: an overflow under fp16, or `train.on_nonfinite=skip`."""

    @property
    def update_seconds(self) -> float:
        """Wall time of the window, loading included."""
        return self.result.seconds

    @property
    def samples_per_second(self) -> float:
        """Samples of the window over `update_seconds`."""
        return self.window_samples / self.update_seconds

    @property
    def compute_seconds(self) -> float:
        """The rest of `update_seconds`."""
        return max(0.0, self.update_seconds - self.data_seconds - self.sync_seconds)

    def known(self) -> dict[str, Any]:
        """Returns all that is recorded of the update (`RECORDED`) by name, without what is None or as usual (`_USUAL`).

        What is of a parameter group is named `lr/GROUP` and `grad_norm/GROUP`.
        """
        values = {name: getattr(self, name) for name in RECORDED}
        values |= {f"lr/{name}": value for name, value in self.group_lrs.items()}
        values |= {f"grad_norm/{name}": value for name, value in self.group_norms.items()}
        return {name: v for name, v in values.items() if v is not None and v != _USUAL.get(name)}


RECORDED = (
    *(entry.name for entry in fields(UpdateRecord) if entry.name not in ("result", "group_lrs")),
    *(name for name, value in vars(UpdateRecord).items() if isinstance(value, _OfResult) and name != "group_norms"),
    *("update_seconds", "samples_per_second"),
)
"""Names of what is recorded of each update. A task's metrics have other ones."""
_USUAL = {"evaluations": 1, "data_wait": 0.0}
"""Values that are not worth recording."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRecord:
    """Reported after each evaluation."""

    update: int
    """Updates done when the evaluation was made."""
    epoch: int
    metrics: dict[str, float]
    """`loss` and the task's metrics, exact over the whole evaluation set; `loss/NAME` of each loss, if there are
    several."""
    references: dict[str, float] = field(default_factory=dict)
    """Losses to compare with, named by the dataset (the text's unigram entropy, say)."""
    sample: str | None = None
    """A text that shows what the model does, if the task makes one."""
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RunEnd:
    """Reported once, after the last evaluation."""

    updates: int
    samples: int
    skipped_updates: int
    stopped_early: str | None
    """The reason why the run ended before its last update, or None."""
    interrupted: str | None = None
    """The signal (`SIGTERM`, …) that the run was asked to stop by, when it is to be started again; else None."""
    is_saved: bool = True
    """Whether a run that was asked to stop has a checkpoint of its last update."""
    evaluation: EvaluationRecord | None
    """The last evaluation."""
    train_seconds: float
    """Wall time of the updates, evaluations left out."""
    total_seconds: float
    """Wall time of the whole run."""
    samples_per_second: float
    """Over `train_seconds` without `warm_up_seconds`."""
    warm_up_updates: int = 0
    """Updates in which a rank compiled."""
    warm_up_seconds: float = 0.0
    """Part of `train_seconds`: those updates."""
    compile_seconds: float = 0.0
    """Part of `warm_up_seconds` that rank 0 spent compiling."""
    data_share: float
    """Share of that same time spent waiting for micro-batches, from 0 to 1."""
    compute_share: float
    sync_share: float
    peak_memory_bytes: int
    """Highest point on the rank that used most: device memory on CUDA, resident set on CPU."""
    peak_memory_kind: str
    """Name of what `peak_memory_bytes` measures."""
    run_dir: Path | None


class Observer:
    """Watches a run. Override what is needed: each method does nothing by itself.

    It is built and called on rank 0 only. One that overrides `on_model` is built on every rank, as the forward of a
    sharded model needs them all; `on_model` and `close` are called there too, the others on rank 0 only.

    An observer must not change the model, the optimizer or the random state: a run without observers must come out the
    same. An exception in an observer ends the run.
    """

    def on_start(self, start: RunStart) -> None:
        """Called before the first update."""

    def on_update(self, record: UpdateRecord) -> None:
        """Called after each update."""

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """Called after each evaluation."""

    def on_model(self, model: nn.Module, device: torch.device, record: EvaluationRecord) -> None:
        """Called on every rank after each evaluation and `on_evaluation`, with the weights that were evaluated.

        The model is in evaluation mode, gradients are off, and autocast is as in training. Ranks draw the same random
        numbers, and those of the run are put back. Under `strategy=fsdp` all ranks must call the model equally often,
        and parameters are DTensors: shards, of which `full_tensor()`, called on all ranks, gathers the whole.

        Args:
            model: the bare one, not wrapped by DDP.
            device: where its inputs belong.
        """

    def on_end(self, end: RunEnd) -> None:
        """Called at the end of a run that has not failed."""

    def close(self) -> None:
        """Releases what is held. Called last, also when the run ended with an error."""
