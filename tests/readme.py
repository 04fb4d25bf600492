"""The code blocks of the README."""

from __future__ import annotations

import re

from launching import ROOT

README = (ROOT / "README.md").read_text()


def block_run_by(test: str) -> str:
    """The one block that is marked as run by a test file."""
    (found,) = re.findall(rf"<!-- run by tests/{test} -->\n```python\n(.*?)```", README, flags=re.DOTALL)
    return str(found)
