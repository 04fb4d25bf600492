"""The two parts that each reference dataset has."""

from __future__ import annotations

from distaccum.errors import UserError

TRAIN = "train"
EVALUATION = "evaluation"


def check_split(split: str, dataset: str) -> None:
    """Raises a `UserError` unless `split` is one of the two; `dataset` is the name that the message gives."""
    if split not in (TRAIN, EVALUATION):
        raise UserError(f"{dataset}: split={split!r} is not known. Give {TRAIN!r} or {EVALUATION!r}.")
