"""Checks of the models' arguments and inputs."""

from __future__ import annotations

from collections.abc import Sequence

from distaccum.errors import UserError


def require_at_least_one(model: str, **values: int | Sequence[int]) -> None:
    """Raises a `UserError` that names the argument, unless each number (or each of a list) is at least 1."""
    for name, value in values.items():
        shown = value if isinstance(value, int) else list(value)
        if any(number < 1 for number in (shown if isinstance(shown, list) else [shown])):
            raise UserError(f"{model}: {name}={shown} is impossible: it must be at least 1.")


def require_probability(model: str, **values: float) -> None:
    """Raises a `UserError` that names the argument, unless each value lies in [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise UserError(f"{model}: {name}={value} must lie in [0, 1).")


def require_sample_shape(model: str, expected: Sequence[int], actual: Sequence[int]) -> None:
    """Raises a `UserError` that shows both shapes, unless a batch of shape `actual` holds samples of `expected`."""
    if tuple(actual[1:]) != tuple(expected):
        raise UserError(
            f"{model}: the model was built for samples of shape {list(expected)}, and got a batch of shape "
            f"{list(actual)}. Set model.input_shape, or mend the dataset."
        )
