"""One rank of one run of a study: trains with the configuration in its job file, as `distaccum.train` does.

Started by `distaccum.tools.study.point_process` as `python -m distaccum.tools.study.worker JOB`, under torchrun if
there are several ranks.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path

import torch

from distaccum.errors import EXIT_INTERRUPTED, EXIT_STATUS, EXIT_UNFINISHED, OtherRankFailedError, UserError
from distaccum.runtime.logs import flush_output, make_output_safe, print_error
from distaccum.tools.bench.portable import from_portable
from distaccum.training.run import train

_SECONDS_TO_BE_STOPPED = 5.0


def _status(job_file: str) -> int:
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    try:
        interrupted = train(from_portable(job["config"])).interrupted
    except OtherRankFailedError:
        time.sleep(_SECONDS_TO_BE_STOPPED)  # ending first would have the launcher stop the rank that prints why
        return EXIT_STATUS
    except UserError as error:
        print_error(str(error))
        return EXIT_STATUS
    if interrupted is None:
        return 0
    return EXIT_INTERRUPTED if interrupted == "SIGINT" else EXIT_UNFINISHED


if __name__ == "__main__":
    make_output_safe()
    status = _status(sys.argv[1])
    logging.shutdown()
    flush_output()
    if "RANK" in os.environ:
        os._exit(status)  # as distaccum.cli does: taking the interpreter down may abort a rank that is done
    sys.exit(status)
