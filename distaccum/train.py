"""Trains a model: `python -m distaccum.train`, `torchrun --nproc_per_node=4 -m distaccum.train`, `distaccum-train`."""

from __future__ import annotations

from distaccum.cli import run_entry_point
from distaccum.config import TrainConfig
from distaccum.errors import EXIT_INTERRUPTED, EXIT_UNFINISHED


def _run(config: TrainConfig) -> int:
    # Here and not above: --help, --cfg and a mistake in an override shouldn't wait for torch.
    from distaccum.training.run import train

    interrupted = train(config).interrupted
    if interrupted is None:
        return 0
    return EXIT_INTERRUPTED if interrupted == "SIGINT" else EXIT_UNFINISHED


def main() -> None:
    """Runs the command."""
    run_entry_point("train", _run)


if __name__ == "__main__":
    main()
