"""`python -m distaccum.train`, which saves the final parameters too: record_run.py OUT.pt [overrides]."""

from __future__ import annotations

import sys
from typing import Any

import torch
from examples import flat

from distaccum.train import main
from distaccum.training.trainer import Trainer


def _record(path: str) -> None:
    fit = Trainer.fit

    def recorded(self: Trainer) -> Any:
        end = fit(self)
        parameters = flat(self.strategy.module)  # on every rank: shards are gathered
        if self.observers:
            torch.save(parameters, path)
        return end

    Trainer.fit = recorded  # type: ignore[method-assign]


if __name__ == "__main__":
    _record(sys.argv.pop(1))
    main()
