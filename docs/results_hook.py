"""Shows what stands in `benchmarks/results` on the site, which mkdocs knows only by what is under `docs`.

Pages link to it by its place in the repository (`../benchmarks/results/run.svg`), so that they can be read there, too.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = Path("benchmarks") / "results"


def on_files(files: Files, config: Any) -> Files:
    """Adds the results as files of the site, in the folder `results`."""
    root = Path(config.config_file_path).parent
    for path in sorted((root / RESULTS).iterdir()):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turns links to the results into links to those files."""
    here = posixpath.dirname(page.file.src_uri)
    up = posixpath.relpath("results", here or ".")
    return re.sub(r"\]\((?:\.\./)+benchmarks/results/", f"]({up}/", markdown)
