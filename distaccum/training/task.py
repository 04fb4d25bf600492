"""Builds the task that a configuration names."""

from __future__ import annotations

from typing import Any

from torch import nn

from distaccum.config import instantiate as targets
from distaccum.errors import UserError


def built_task(section: Any) -> Any:
    """Returns the task of a section `task`.

    Raises:
        UserError: it can't be built, or can't be called with a model and a micro-batch.
    """
    task = targets.build(section, "task")
    name = type(task).__name__
    if not callable(task):
        raise UserError(f"task built a {name}, which can't be called.")
    signature = targets.signature_of(task.forward if isinstance(task, nn.Module) else task)
    try:
        if signature is not None:
            signature.bind(None, None)
    except TypeError as error:
        raise UserError(
            f"task built a {name}, which can't be called with a model and a micro-batch: {error}. A task is a "
            "distaccum.tasks.Task, or takes these two and returns a distaccum.TaskOutput."
        ) from None
    return task
