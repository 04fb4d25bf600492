"""Iterates over the micro-batches of a window, and refuses those that its ranks can't take together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

from distaccum.errors import UserError
from distaccum.loaders import Window
from distaccum.strategies import Strategy

Batch = TypeVar("Batch")


def require_equal_micro_steps(micro_batches: Iterable[Any], strategy: Strategy) -> None:
    """Refuses a window whose ranks may take unequally many micro-steps, if the strategy's hold collectives.

    Raises:
        UserError: it is one; the ranks would wait for each other for ever.
    """
    if isinstance(micro_batches, Window) and strategy.equal_micro_steps and not micro_batches.equal_micro_steps:
        raise UserError(
            "all ranks must take equally many micro-steps here (FSDP, a static graph and SyncBatchNorm have "
            "collectives in each of them), and this window doesn't promise that. Give WindowLoader "
            "equal_micro_steps=True."
        )


def with_last(items: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Yields each item and whether it is the last one. Looks ahead by one item only where the length is not known.

    Raises:
        UserError: there are more items than their `len()`, or fewer.
    """
    if isinstance(items, Sized):
        count, number = len(items), 0
        for number, item in enumerate(items, 1):
            if number > count:
                break
            yield item, number == count
        if number != count:
            raise UserError(
                f"the micro-batches (a {type(items).__name__}) have the len() {count}, and there are "
                f"{'more' if number > count else number}. Give a list, or a generator, which has no len()."
            )
        return
    iterator = iter(items)
    for item in iterator:
        current = item
        for following in iterator:
            yield current, False
            current = following
        yield current, True
