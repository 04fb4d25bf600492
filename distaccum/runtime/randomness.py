"""Seeds derived from the run's seed and a purpose; states of random generators, saved, restored and watched."""

from __future__ import annotations

import ctypes
import hashlib
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

_64_BITS = (1 << 64) - 1
_32_BITS = (1 << 32) - 1


def derived_seed(seed: int, *purpose: str | int) -> int:
    """A seed of 63 bits for one purpose, unrelated to the seeds of other purposes."""
    digest = hashlib.blake2b("/".join(map(str, (seed, *purpose))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def mixed_seed(base: int, index: int) -> int:
    """A seed of 64 bits for one of many: the output function of SplitMix64 (Steele, Lea and Flood, 2014).

    Cheaper than `derived_seed`, from which `base` should come.
    """
    value = (base + index * 0x9E3779B97F4A7C15) & _64_BITS
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _64_BITS
    return value ^ (value >> 31)


def seed_cpu(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's global generators on the CPU, and those only, in a few microseconds.

    Args:
        seed: 64 bits.
    """
    random.seed(seed)
    # Both are Mersenne twisters that are seeded alike with 32 bits: the same ones would make their numbers the same.
    np.random.seed(seed >> 32)
    torch.default_generator.manual_seed(seed & _32_BITS)


@dataclass(frozen=True, slots=True)
class GlobalStates:
    """States of Python's, NumPy's and torch's global generators on the CPU, and of torch's on some GPUs.

    As a context it restores them at its end.
    """

    python: Any
    numpy: Any
    torch: Tensor
    cuda: dict[Any, Tensor] = field(default_factory=dict)

    @classmethod
    def now(cls, *devices: Any) -> GlobalStates:
        """The present states of the CPU's generators, and of those of the GPUs among the devices."""
        gpus = [device for device in map(torch.device, devices) if device.type == "cuda"]
        cuda = {gpu: torch.cuda.get_rng_state(gpu) for gpu in gpus}
        return cls(random.getstate(), np.random.get_state(legacy=False), torch.default_generator.get_state(), cuda)

    def put_back(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.default_generator.set_state(self.torch)
        for gpu, state in self.cuda.items():
            torch.cuda.set_rng_state(state, gpu)

    def __enter__(self) -> None:
        return

    def __exit__(self, *error: object) -> None:
        self.put_back()


def random_state(device: torch.device) -> dict[str, Tensor]:
    """States of the global generators of torch (CPU, and the device if it is a GPU), Python and NumPy, as tensors."""
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
    """Restores what `random_state` returned."""
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


class DrawDetector:
    """Detects whether some code has drawn from the global generators on the CPU, within microseconds.

    `getstate` of Python and NumPy, and comparing what they return, takes about 100 µs, twice for each micro-batch: a
    fifth of a micro-step of 1 ms. So their memory is compared instead (4 µs for all three generators), and `getstate`
    is called only when it has changed. That memory has had the same layout in all versions so far; Python's `getstate`
    is used if it hasn't. All of it is compared: a position alone is the same again after as many draws as a generator
    has words, and a seed alone doesn't change with draws.

        >>> detector = DrawDetector()
        >>> states = detector.start()
        >>> _ = random.random()
        >>> detector.has_drawn()
        True
        >>> states.put_back()
        >>> detector.has_drawn()
        False
    """

    def __init__(self) -> None:
        self._peeks_python = _python_memory() == _python_words(random.getstate())
        self._remember(GlobalStates.now())

    def start(self) -> GlobalStates:
        """Saves the states and returns them."""
        seen = self._look()
        if seen != self._seen:
            python = self._states.python if seen[0] == self._seen[0] else random.getstate()
            numpy = self._states.numpy if seen[1] == self._seen[1] else np.random.get_state(legacy=False)
            self._remember(GlobalStates(python, numpy, torch.default_generator.get_state()))
        return self._states

    def _remember(self, states: GlobalStates) -> None:
        self._states = states
        # NumPy makes normal numbers in pairs. To draw one that is left over moves nothing that can be looked at.
        self._has_left_over = bool(states.numpy["has_gauss"])
        self._seen = self._look()

    def has_drawn(self) -> bool:
        """Whether the states are no longer those at `start`."""
        return self._look() != self._seen

    def _look(self) -> tuple[Any, ...]:
        # gauss_next: the second number of a pair of random.gauss.
        python = (_python_memory(), _PYTHON.gauss_next) if self._peeks_python else random.getstate()
        return python, (_numpy_look(), _numpy_left_over() if self._has_left_over else None), _torch_memory()


_PYTHON: Any = random._inst
_Words: Any = ctypes.c_char * (4 * (624 + 1))
"""Memory of a Mersenne twister: its words, and the position among them."""
_BEHIND_HEADER = id(_PYTHON) + object.__basicsize__
_HAS_WORDS = type(_PYTHON).__basicsize__ >= object.__basicsize__ + ctypes.sizeof(_Words)


def _python_memory() -> bytes | None:
    """The memory behind the object header of Python's global generator: position, then words."""
    return _Words.from_address(_BEHIND_HEADER).raw if _HAS_WORDS else None


def _python_words(state: Any) -> bytes:
    *words, position = state[1]
    return np.array([position, *words], np.uint32).tobytes()


def _numpy_look() -> Any:
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if isinstance(generator, np.random.MT19937):
        # NumPy's interface for ctypes: struct { uint32_t key[624]; int pos; }
        return _Words.from_address(generator.ctypes.state_address).raw
    return repr(generator.state)


def _numpy_left_over() -> tuple[int, float]:
    state = np.random.get_state(legacy=False)
    return state["has_gauss"], state["gauss"]


_TorchState: Any = ctypes.c_char * torch.default_generator.get_state().nbytes


def _torch_memory() -> bytes:
    state = torch.default_generator.get_state()
    return _TorchState.from_address(state.data_ptr()).raw  # type: ignore[no-any-return]
