"""Trains with arguments that differ between ranks: those that start with `RANK:` are for that rank alone."""

from __future__ import annotations

import os
import re
import sys

from distaccum.train import main

if __name__ == "__main__":
    found = [re.fullmatch(r"(?:(\d+):)?(.*)", argument) for argument in sys.argv[1:]]
    sys.argv[1:] = [match[2] for match in found if match and match[1] in (None, os.environ["RANK"])]
    main()
