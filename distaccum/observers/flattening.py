"""Names for the numbers of an update, as trackers show them."""

from __future__ import annotations

from typing import Any


def flattened(line: dict[str, Any]) -> dict[str, Any]:
    """Returns the numbers of an update by name.

    Metrics have their own names, a loss of several is `loss/NAME`, and norms of a block are `layers/BLOCK/NAME`.

    Args:
        line: what `UpdateRecord.known()` returns, or an update's line of `metrics.jsonl`, which lacks what is empty.
    """
    values = {key: value for key, value in line.items() if key not in _PARTS}
    metrics = dict(line.get("metrics", {})) | {f"loss/{name}": mean for name, mean in line.get("terms", {}).items()}
    for block, norms in line.get("layers", {}).items():
        values |= {f"layers/{block}/{name}": value for name, value in norms.items()}
    seconds = [float(line.get(name) or 0) for name in ("update_seconds", "data_seconds", "sync_seconds")]
    own = {
        "compute_seconds": max(0.0, seconds[0] - seconds[1] - seconds[2]),
        "skipped": int(line.get("skipped", False)),
    }
    return metrics | values | own


_PARTS = ("update", "compile_seconds", "metrics", "terms", "layers")
