"""What the package uses of a `DataLoader`'s workers that torch keeps private is still there."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling, worker


def test_what_is_used_of_an_iterator_with_workers() -> None:
    iterator = iter(DataLoader(range(4), num_workers=1))  # type: ignore[arg-type, var-annotated]
    names = ["_workers", "_shutdown", "_shutdown_workers", "_worker_result_queue", "_index_queues", "_worker_pids_set"]
    for name in names:
        assert hasattr(iterator, name), f"torch {torch.__version__} has no {type(iterator).__name__}.{name}"
    iterator._shutdown_workers()
    for name in ("_remove_worker_pids", "_set_SIGCHLD_handler"):
        assert hasattr(signal_handling, name), f"torch {torch.__version__} has no signal_handling.{name}"
    assert hasattr(worker, "_worker_info"), f"torch {torch.__version__} has no worker._worker_info"
