"""Datasets whose samples a transform of the user's makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import Dataset

from distaccum.errors import UserError, require


class Transformed(Dataset[Any]):
    """Base of datasets that take a `transform`. Its public attributes (`collate_fn`, `num_classes`, …) are theirs.

    Args:
        transform: called with a sample as it was read, returns what is used in its place. None: nothing is changed.

    Raises:
        UserError: it can't be called.
    """

    def __init__(self, transform: Callable[[Any], Any] | None) -> None:
        require(transform is None or callable(transform), f"data.transform={transform!r} can't be called.")
        self._transform = transform

    def __getattr__(self, name: str) -> Any:
        # What loaders ask for (`__getitems__`) and what pickling does must be the dataset's own, and so its lengths.
        if not name.startswith("_") and name != "lengths":
            found = getattr(self.__dict__.get("_transform"), name, None)
            if found is not None:
                return found
        raise AttributeError(f"{type(self).__name__} has no attribute {name}")

    def _transformed(self, sample: Any, place: str) -> Any:
        """Returns what the transform makes of a sample; `place` says in messages which one it is."""
        if self._transform is None:
            return sample
        try:
            return self._transform(sample)
        except Exception as error:
            said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            raise UserError(f"{place}, in data.transform: {said}") from error
