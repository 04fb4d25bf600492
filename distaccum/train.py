"""Trains a model: `python -m distaccum.train`, `torchrun --nproc_per_node=4 -m distaccum.train`, `distaccum-train`."""

from __future__ import annotations

from functools import partial

from distaccum.cli import run_entry_point
from distaccum.config import TrainConfig
from distaccum.config.sweep import Finished
from distaccum.errors import EXIT_INTERRUPTED, EXIT_UNFINISHED
from distaccum.runtime.imports import quick_imports


def _run(config: TrainConfig) -> int | Finished:
    # Here and not above: --help, --cfg and a mistake in an override shouldn't wait for torch.
    with quick_imports():
        import torch._dynamo  # noqa: F401 - the first optimizer would import it, and that outside of here

        from distaccum.training.run import best_evaluation, train

    end = train(config)
    if end.interrupted is not None:
        return EXIT_INTERRUPTED if end.interrupted == "SIGINT" else EXIT_UNFINISHED
    assert end.run_dir is not None
    best = partial(best_evaluation, end.run_dir, config.checkpoint)
    return Finished(str(end.run_dir), config.checkpoint.best_metric, best)


def main() -> None:
    """Runs the command."""
    run_entry_point("train", _run)


if __name__ == "__main__":
    main()
