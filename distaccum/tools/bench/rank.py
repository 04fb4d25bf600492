"""One rank of `distaccum.tools.bench.processes`: runs the function in its job file, and ends with the status that this
returns. Started as `python -m distaccum.tools.bench.rank JOB`."""

from __future__ import annotations

import logging
import os
import pickle
import sys
import time
from pathlib import Path

import torch

from distaccum.errors import EXIT_STATUS, OtherRankFailedError, UserError
from distaccum.runtime.logs import flush_output, make_output_safe, print_error

_SECONDS_TO_BE_STOPPED = 5.0


def _status(job_file: str) -> int:
    threads, run = pickle.loads(Path(job_file).read_bytes())
    torch.set_num_threads(threads)
    try:
        status: int = run()
        return status
    except OtherRankFailedError:
        time.sleep(_SECONDS_TO_BE_STOPPED)  # ending first would have the launcher stop the rank that prints why
    except UserError as error:
        print_error(str(error))
    return EXIT_STATUS


if __name__ == "__main__":
    make_output_safe()
    status = _status(sys.argv[1])
    logging.shutdown()
    flush_output()
    if "RANK" in os.environ:
        os._exit(status)  # as distaccum.cli does: taking the interpreter down may abort a rank that is done
    sys.exit(status)
