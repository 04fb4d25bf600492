"""Saves and restores runs: checkpoints are complete or absent, fit any number of ranks, and are never unpickled."""

from __future__ import annotations

from distaccum.checkpoints.checkpointer import Checkpointer, Stateful
from distaccum.checkpoints.export import Exported, export_model, remove_export
from distaccum.checkpoints.folder import Checkpoint, checked, checkpoints_in, clear_leftovers, newest_whole
from distaccum.checkpoints.state import averaged_weights, load_model, members_of, persistent_buffers, putting_back
from distaccum.checkpoints.weights import MODEL_FILE, load_exported

__all__ = [
    "MODEL_FILE",
    "Checkpoint",
    "Checkpointer",
    "Exported",
    "Stateful",
    "averaged_weights",
    "checked",
    "checkpoints_in",
    "clear_leftovers",
    "export_model",
    "load_exported",
    "load_model",
    "members_of",
    "newest_whole",
    "persistent_buffers",
    "putting_back",
    "remove_export",
]
