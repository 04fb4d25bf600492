"""Saves and restores runs: checkpoints are complete or absent, fit any number of ranks, and are never unpickled."""

from __future__ import annotations

from distaccum.checkpoints.checkpointer import Checkpointer
from distaccum.checkpoints.export import Exported, export_model, remove_export
from distaccum.checkpoints.folder import Checkpoint, checked, checkpoints_in, clear_leftovers, newest_whole
from distaccum.checkpoints.memory_place import forget_memory, has_memory
from distaccum.checkpoints.newest import newest_anywhere
from distaccum.checkpoints.restoring import Stateful
from distaccum.checkpoints.state import averaged_weights, load_model, members_of, putting_back, read_own
from distaccum.checkpoints.weights import MODEL_FILE, load_exported
from distaccum.runtime.buffers import persistent_buffers

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
    "forget_memory",
    "has_memory",
    "load_exported",
    "load_model",
    "members_of",
    "newest_anywhere",
    "newest_whole",
    "persistent_buffers",
    "putting_back",
    "read_own",
    "remove_export",
]
