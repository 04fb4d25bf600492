"""How a rank says why a measurement failed; tests/tools has whole tools."""

from __future__ import annotations

import pytest
import torch

from distaccum.errors import UserError
from distaccum.tools.bench.worker import _explain_failure


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "memory"),
        (MemoryError(), "memory"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "bug"),
        (UserError("a sample can't be read"), "user"),
    ],
)
def test_running_out_of_memory_is_no_bug(error: Exception, kind: str) -> None:
    assert _explain_failure(error)["kind"] == kind
