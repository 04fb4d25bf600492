"""Where a run stands, as its checkpoints say it, and whether another configuration can go on from there."""

from __future__ import annotations

from typing import Any

from distaccum.loaders import WindowLoader

PROGRESS_KEYS = frozenset(
    ("totals", "total_seconds", "epoch", "next_window", "owes_evaluation", "evaluation", "windows", "config")
)
"""What a trainer's checkpoint says of where the run stands."""


def windows_identity(loader: WindowLoader) -> dict[str, Any]:
    """All that the samples of a window depend on."""
    return {
        "batch.global_batch_size": loader.plan.global_batch_size,
        "batch.schedule": str(loader.sizes.rule),
        "batch.drop_last": loader.drop_last,
        "seed": loader.seed,
        "training samples": loader.num_samples,
    }


def different_windows(before: dict[str, Any], loader: WindowLoader) -> str:
    """What `windows_identity` said before and now, where it differs; empty where nothing does."""
    now = windows_identity(loader)
    before = {"batch.schedule": "constant", **before}
    return ", ".join(f"{key}={before[key]} and now has {now[key]}" for key in now if before[key] != now[key])


def position(loader: WindowLoader, epoch: int, next_window: int) -> int:
    """Samples of an epoch that have been trained on when a window is the next one."""
    return loader.sizes.bounds(epoch)[next_window - 1][1] if next_window else 0


def window_at(loader: WindowLoader, epoch: int, position: int) -> int:
    """The first window of an epoch that begins at a position, or later."""
    return sum(start < position for start, _ in loader.sizes.bounds(epoch))


def next_window(progress: dict[str, Any], loader: WindowLoader) -> int:
    """The number in its epoch of the window that a run goes on with.

    Where the windows are others by now, that is the first which begins where the run had come to, or later.
    """
    index: int = progress["next_window"]
    if not different_windows(progress["windows"], loader):
        return index
    done = progress.get("position", index * progress["windows"]["batch.global_batch_size"])
    return window_at(loader, progress["epoch"], done)


def updates_ahead(progress: dict[str, Any], loader: WindowLoader) -> int:
    """How many more updates a run has made than there are windows before its next one: 0, unless its windows have
    become others on the way."""
    made: int = progress["totals"]["updates"]
    return made - loader.number(progress["epoch"], next_window(progress, loader))
