from __future__ import annotations

import subprocess
import sys

_CODE = """
import gc, sys
from distaccum.runtime.imports import quick_imports
with quick_imports():
    assert not gc.isenabled()
assert gc.isenabled() and gc.get_freeze_count()
gc.unfreeze()
try:
    with quick_imports():
        raise ImportError
except ImportError:
    assert gc.isenabled() and not gc.get_freeze_count()
sys.modules["torch"] = None
with quick_imports():
    assert gc.isenabled(), "the process is somebody else's"
assert not gc.get_freeze_count()
del sys.modules["torch"]
gc.disable()
with quick_imports():
    pass
assert not gc.isenabled() and not gc.get_freeze_count()
"""


def test_the_collector_rests_and_is_put_back() -> None:
    subprocess.run([sys.executable, "-c", _CODE], check=True)
