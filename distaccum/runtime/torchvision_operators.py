"""Makes torchvision importable beside a build of torch that its compiled operators don't fit.

Whoever installs torch for CPUs and torchvision from another index has operators that are built for CUDA and can't be
loaded. All that is written in Python works without them, image transforms and what timm and transformers take of it;
but since torchvision 0.17 its import fails, and with it theirs.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

_defined: list[torch.library.Library] = []
"""Kept, as the operators of a library go with it."""


def tolerate_missing_operators() -> None:
    """Declares the operators that torchvision's import describes, if it can't load them.

    To be called before timm, torchvision or transformers are imported. A call of such an operator then says that it has
    no implementation.
    """
    if "torchvision" in sys.modules or _defined or (spec := importlib.util.find_spec("torchvision")) is None:
        return
    try:
        for path in Path(spec.origin or "").parent.glob("_C*.so"):
            torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError:
        library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            schema = f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            library.define(schema)  # type: ignore[no-untyped-call]
        _defined.append(library)
