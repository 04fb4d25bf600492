"""The random generators of a process as tensors, so that a resumed run draws what the unbroken one would have drawn."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor


def random_state(device: torch.device) -> dict[str, Tensor]:
    """States of the global generators of torch (CPU, and the device if it is a GPU), Python and NumPy."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        # Both keep the second number of a pair of normally distributed ones; NaN stands for none.
        "python_normal": torch.tensor(float("nan") if gauss is None else gauss, dtype=torch.float64),
        "numpy": torch.tensor([*map(int, keys), int(position)], dtype=torch.int64),
        "numpy_normal": torch.tensor(cached if has_gauss else float("nan"), dtype=torch.float64),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Puts back what `random_state` gave."""
    torch.set_rng_state(state["torch"])
    gauss = float(state["python_normal"])
    random.setstate((3, tuple(state["python"].tolist()), None if gauss != gauss else gauss))
    *keys, position = state["numpy"].tolist()
    cached = float(state["numpy_normal"])
    has_gauss = cached == cached
    np.random.set_state(
        ("MT19937", np.array(keys, dtype=np.uint32), position, int(has_gauss), cached if has_gauss else 0.0)
    )
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
