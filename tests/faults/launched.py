"""A training that looks, on its ranks, for what the launcher has left of itself there."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading

import torch

from distaccum.train import main

assert multiprocessing.get_start_method() == "fork", "data workers would be started in another way"
assert os.getsid(0) == os.getpid(), "Ctrl-C would come twice"
assert not signal.pthread_sigmask(signal.SIG_BLOCK, []), "signals would not come"
assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == [signal.SIG_DFL] * 2
assert sys.argv[1:] == ["data.train.no=${local_rank}"]
assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"]) == 1
assert {thread.name for thread in threading.enumerate()} == {"MainThread", "distaccum-launcher"}
assert "distaccum.training.run" in sys.modules, "ranks would import everything"
main()
