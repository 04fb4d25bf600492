"""Trains a model: `python -m distaccum.train`, `torchrun --nproc_per_node=4 -m distaccum.train`, `distaccum-train`."""

from __future__ import annotations

from distaccum.config import TrainConfig
from distaccum.entry import run_entry_point


def _run(config: TrainConfig) -> None:
    # Here and not above: --help, --cfg and a mistake in an override shouldn't wait for torch.
    from distaccum.assembly import train

    train(config)


def main() -> None:
    """The console script."""
    run_entry_point(_run, config_name="train")


if __name__ == "__main__":
    main()
