"""`python -m late SECONDS …`: like `python -m distaccum.train …`, but slow to start when torchrun has restarted it."""

from __future__ import annotations

import os
import sys
import time

if __name__ == "__main__":
    seconds = float(sys.argv.pop(1))
    if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        time.sleep(seconds)
    from distaccum.train import main

    main()
