"""Tensors of a checkpoint by name, whatever the strategy:

    model/<name>                       parameters, and rank 0's persistent buffers; of frozen parameters that were left
                                       out, the manifest has `frozen`, by which they are told from others
    outside/.outside.<n>               parameters of the optimizer that the model doesn't have, by their place there
    optimizer/<parameter>/<name>       the optimizer's state of a parameter
    optimizer_json/…                   the same of all that is no tensor, as JSON; tensors that it holds are
                                       optimizer/<parameter>/<name>@<i>
    optimizer…/.state/<name>           the optimizer's state that is no parameter's
    optimizer…/.dict/<name>            what its `state_dict()` holds besides state and groups, if it has one of its own
    also/<kind>/<name>                 further tensors of the run (averages of the weights); as for the model, rank 0's
                                       where ranks may differ
    rank/<r>/random/<generator>        of one rank alone
    rank/<r>/buffers/<name>            where a strategy lets each rank have buffers of its own
    rank/<r>/strategy/<name>           what the strategy remembers on a rank (PowerSGD's error feedback)
    rank/<r>/<kind>/<name>             further tensors of one rank alone (`Checkpointer.own`)

Names are those of the user's own module, so ddp, fsdp and a single process read each other's. Sharded tensors are
DTensors, of which `torch.distributed.checkpoint` saves and loads each rank's part.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from distaccum.checkpoints.encoding import decoded, encoded
from distaccum.checkpoints.folder import Checkpoint
from distaccum.checkpoints.frozen import check_same_frozen
from distaccum.checkpoints.optimizer_state import optimizer_tensors, outside_parameters
from distaccum.checkpoints.storage import ManifestReader, SavePlannerOf
from distaccum.errors import UserError
from distaccum.runtime.buffers import persistent_buffers
from distaccum.runtime.randomness import random_state
from distaccum.strategies import Strategy

logger = logging.getLogger(__name__)


def state_tensors(
    strategy: Strategy,
    optimizer: torch.optim.Optimizer,
    rank: int,
    also: Mapping[str, Mapping[str, Tensor]],
    own: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """All tensors that this rank takes part in saving; not copies.

    Args:
        also: further tensors of the run, by kind and name.
        own: further tensors of this rank alone, by name.

    Raises:
        UserError: the optimizer's state holds anything but values of Python's own kinds and tensors.
    """
    strategy.at_rest()
    tensors = {f"model/{name}": parameter.detach() for name, parameter in strategy.module.named_parameters()}
    if rank == 0:
        tensors |= {f"model/{name}": buffer for name, buffer in persistent_buffers(strategy.module)}
    elif not strategy.shares_buffers:
        tensors |= {f"rank/{rank}/buffers/{name}": buffer for name, buffer in persistent_buffers(strategy.module)}
    tensors |= {name: value.detach() for name, value in outside_parameters(strategy.module, optimizer).items()}
    tensors |= optimizer_tensors(strategy.module, optimizer)
    parameters = dict(strategy.module.named_parameters())
    for kind, tensors_of_kind in also.items():
        # What is neither sharded nor a parameter's may differ between ranks, as BatchNorm's statistics do: rank 0's
        # count, as they do of the model.
        mine = {n: v for n, v in tensors_of_kind.items() if rank == 0 or n in parameters or isinstance(v, DTensor)}
        tensors |= named_also(kind, mine)
    tensors |= {f"rank/{rank}/{name}": value for name, value in own.items()}
    tensors |= {f"rank/{rank}/random/{name}": value for name, value in random_state(strategy.device).items()}
    return tensors | {f"rank/{rank}/strategy/{name}": value for name, value in strategy.state_tensors().items()}


def named_also(kind: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Further tensors of a run, by their names in a checkpoint."""
    return {f"also/{kind}/{name}": value for name, value in values.items()}


def also_in(checkpoint: Checkpoint, also: Mapping[str, Mapping[str, Tensor]], *, logs: bool) -> dict[str, Tensor]:
    """Returns the further tensors that a checkpoint has, by their names there. A kind that it lacks stays as it is.

    Args:
        also: further tensors of the run, by kind and name.
        logs: say so of kinds that it doesn't have.

    Raises:
        UserError: it has other ones of a kind.
    """
    found: dict[str, Tensor] = {}
    for kind, values in also.items():
        wanted = named_also(kind, values)
        if not any(name.startswith(f"also/{kind}/") for name in checkpoint.manifest["tensors"]):
            if logs:
                logger.info("%s has no %s, which begins anew", checkpoint.path, kind)
            continue
        if missing := sorted(wanted.keys() - checkpoint.manifest["tensors"].keys()):
            raise UserError(
                f"the checkpoint {checkpoint.path} holds another {kind}: {missing[0].removeprefix('also/')} is "
                "missing from it. Configure the same, or begin anew with resume=none and another run_dir."
            )
        found |= wanted
    return found


def members_of(module: nn.Module) -> dict[str, Tensor]:
    """Returns a module's parameters and persistent buffers by name, each once."""
    members = [*module.named_parameters(), *persistent_buffers(module)]
    return {name: tensor.detach() for name, tensor in members}


def check_same_model(
    members: Mapping[str, Tensor],
    shapes: Mapping[str, list[int]],
    source: str = "the checkpoint",
    otherwise: str = "begin anew with resume=none and another run_dir",
) -> None:
    """Refuses a checkpoint of another model.

    Args:
        members: parameters and persistent buffers of the model, by name.
        shapes: of all tensors in the checkpoint, by name.
        source, otherwise: what holds them, and what else can be done, for the message.

    Raises:
        UserError: names what is missing, unexpected or of another shape.
    """
    here = {name: list(value.shape) for name, value in members.items()}
    there = {name.removeprefix("model/"): shape for name, shape in shapes.items() if name.startswith("model/")}
    both = here.keys() & there.keys()
    problems = [f"{name} is missing from it" for name in here.keys() - both]
    problems += [f"{name} is unknown to the model" for name in there.keys() - both]
    problems += [f"{name} is {there[name]} there and {here[name]} here" for name in both if here[name] != there[name]]
    if problems:
        more = f"; and {len(problems) - 3} more differences" if len(problems) > 3 else ""
        raise UserError(
            f"{source} holds another model: {'; '.join(sorted(problems)[:3])}{more}. Configure the model that it "
            f"was made of, or {otherwise}."
        )


def extra_states(module: nn.Module) -> dict[str, Any]:
    """The modules' `get_extra_state()`, by their names, as JSON values.

    Raises:
        UserError: a checkpoint can't hold it.
    """
    return {
        name: of_python(part.get_extra_state(), f"the extra state of {name or 'the model'}", "Make it a buffer")
        for name, part in module.named_modules()
        if type(part).get_extra_state is not nn.Module.get_extra_state
    }


def of_python(value: Any, what: str, mend: str) -> Any:
    """Encodes a value of Python's own kinds as JSON.

    Raises:
        UserError: it is of another kind.
    """
    try:
        return encoded(value)
    except TypeError as error:
        raise UserError(
            f"{what} can't be put into a checkpoint, which holds numbers, texts, small tensors, and lists and "
            f"dictionaries of them: it has {error}. {mend}, or set checkpoint.enabled=false."
        ) from error


def set_extra_states(module: nn.Module, states: Mapping[str, Any]) -> None:
    """Restores what `extra_states` returned."""
    for name, part in module.named_modules():
        if name in states:
            part.set_extra_state(decoded(states[name]))


def write_tensors(writer: Any, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Writes tensors with a writer of torch's; of sharded ones, this rank's part.

    Args:
        group: the ranks that write together. None: this process writes alone.
    """
    with torch.no_grad():
        _without_process_warning()
        save({}, storage_writer=writer, planner=SavePlannerOf(tensors), process_group=group, no_dist=group is None)


def read_tensors(checkpoint: Checkpoint, targets: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Fills tensors with what a checkpoint has under their names; of sharded ones, this rank's part.

    Args:
        group: the ranks that read together. None: this process reads alone.

    Raises:
        UserError: it can't be read.
    """
    try:
        with torch.no_grad():
            _without_process_warning()
            load(
                targets,
                storage_reader=ManifestReader(checkpoint),
                planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=group,
                no_dist=group is None,
            )
    except CheckpointException as error:  # a BaseException
        raise UserError(f"the checkpoint {checkpoint.path} can't be read: {reasons(error)}.") from error


def read_own(checkpoint: Checkpoint, rank: int, kind: str) -> dict[str, Tensor]:
    """Reads the tensors `kind/…` of `Checkpointer.own` of a rank, on the CPU, by what follows; no rank waits.

    Raises:
        UserError: they can't be read.
    """
    prefix = f"rank/{rank}/{kind}/"
    found = {name: entry for name, entry in ManifestReader(checkpoint).formats().items() if name.startswith(prefix)}
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in found.items()}
    if tensors:
        read_tensors(checkpoint, tensors, None)
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def load_model(checkpoint: Checkpoint, module: nn.Module, average: str | None = None) -> None:
    """Puts a checkpoint's weights and buffers into a plain module, on its device and in its formats.

    Each process that calls it reads by itself. Of a schedule-free optimizer's run they are the weights to evaluate.

    Args:
        average: `ema` or `swa`, to take those weights where there are any; frozen parameters have none.

    Raises:
        UserError: the checkpoint holds another model, or can't be read; or it leaves out frozen weights, and the module
            has other ones.
    """
    stored, members = checkpoint.manifest["tensors"], members_of(module)
    check_same_model(members, checkpoint.shapes)
    check_same_frozen(checkpoint, members, None)
    targets = {}
    for name, tensor in members.items():
        path = f"also/{average}/{name}"
        if average is not None and path in stored:
            targets[path] = tensor
        elif name not in checkpoint.frozen:
            targets[f"model/{name}"] = tensor
    read_tensors(checkpoint, targets, None)
    if average is None:
        with putting_back(checkpoint, "optimizer"):
            _leave_training_mode(checkpoint, module)
    with putting_back(checkpoint, "model"):
        set_extra_states(module, checkpoint.state["extra"])


def _leave_training_mode(checkpoint: Checkpoint, module: nn.Module) -> None:
    """Puts the weights x of a schedule-free optimizer in the place of y = (1 − β) z + β x, which it trains with.

    As its eval() does: x = y + (1 − 1/β) (z − y) (Defazio et al. 2024).
    """
    groups = checkpoint.state["optimizer"]["settings"]
    if not groups or not all(group.get("train_mode") is True for group in groups):
        return
    betas = {float(decoded(group["betas"])[0] if "betas" in group else group["momentum"]) for group in groups}
    if len(betas) > 1:
        raise ValueError(f"its groups have several betas, {sorted(betas)}")
    stored, path = checkpoint.manifest["tensors"], "optimizer/{}/z".format
    parameters = {name: p.detach() for name, p in module.named_parameters() if path(name) in stored}
    ends = {path(name): torch.empty_like(parameter) for name, parameter in parameters.items()}
    read_tensors(checkpoint, ends, None)
    for name, parameter in parameters.items():
        parameter.lerp_(ends[path(name)], 1 - 1 / betas.copy().pop())


def averaged_weights(checkpoint: Checkpoint, average: str) -> int | None:
    """Returns how many updates' weights an average in a checkpoint is of; None if there is no average of that name."""
    path = f"also/{average}/n_averaged"
    if path not in checkpoint.manifest["tensors"]:
        return None
    count = torch.zeros((), dtype=torch.int64)
    read_tensors(checkpoint, {path: count}, None)
    return int(count)


@contextmanager
def putting_back(checkpoint: Checkpoint, name: str) -> Iterator[None]:
    """Turns errors of restoring a saved state into one message.

    Raises:
        UserError: in the place of errors about values of another kind.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{checkpoint.path}: the state of {name} that is in it can't be put back ({_reason(error)}). Configure "
            "what it was saved of, or begin anew with resume=none and another run_dir."
        ) from error


def reasons(error: BaseException) -> str:
    """Returns why saving or reading failed, in one line: each reason once, with its first rank if there are several."""
    if not isinstance(error, CheckpointException):
        return _reason(error)
    first_ranks: dict[str, int] = {}
    for rank, (failure, _) in sorted(error.failures.items()):
        first_ranks.setdefault(_reason(failure), rank)
    if len(first_ranks) == 1:
        return next(iter(first_ranks))
    return "; ".join(f"rank {rank}: {reason}" for reason, rank in first_ranks.items())


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _without_process_warning() -> None:
    """Silences torch's warning that with `no_dist` it assumes a single process, as one is meant."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
