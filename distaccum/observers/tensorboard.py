"""Writes the run's numbers for TensorBoard."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path
from typing import Any

import yaml

from distaccum.observers.base import RunStart
from distaccum.observers.tracker import Row, Tracker
from distaccum.runtime.files import write_whole

_LENGTH_BYTES = 8
_CHECKSUM_BYTES = 4
"""A record of an event file: its length, a checksum of that, its content, a checksum of that."""


class TensorBoard(Tracker):
    """Writes `tensorboard/` in the run folder: scalars, and the configuration and samples as texts.
    `tensorboard --logdir` shows it, or several runs below a folder.

    A run that goes on appends to the file, beginning with a mark by which TensorBoard drops what it has from there on.
    The file is written here, and not by the writers of tensorboard and torch, whose threads end with a traceback when
    the disk is full.
    """

    NAME = "tensorboard"

    def __init__(self) -> None:
        super().__init__()
        self._path = Path()

    def _open(self, run_dir: Path, start: RunStart, history: list[Row]) -> list[Row]:
        folder = run_dir / "tensorboard"
        folder.mkdir(exist_ok=True)
        self._path = folder / "events.out.tfevents.distaccum"
        first = 0
        events: list[dict[str, Any]] = [{"file_version": "brain.Event:2"}]
        if self._path.exists():
            last, whole_bytes = _last_step(self._path)
            os.truncate(self._path, whole_bytes)
            # From the last update on, as a killed process may not have written its evaluation any more.
            first = min(start.resumed_update, last)
            events.append({"step": first, "session_log": {"status": "START"}})
        if first == 0:
            text = yaml.safe_dump(start.config, sort_keys=False, allow_unicode=True)
            events.append({"summary": {"value": [_text("config", text)]}})
        self._append(events)
        return [row for row in history if row.update >= first]

    def _write(self, rows: list[Row]) -> None:
        self._append([{"step": row.update, "summary": {"value": _values(row)}} for row in rows])

    def _append(self, events: list[dict[str, Any]]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        records = io.BytesIO()
        writer = RecordWriter(records)
        for event in events:
            writer.write(Event(wall_time=time.time(), **event).SerializeToString())
        with open(self._path, "ab", buffering=0) as file:
            write_whole(file, records.getvalue())


def _last_step(path: Path) -> tuple[int, int]:
    """Returns the step of the last whole record of a file, and where that ends."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import masked_crc32c

    def is_intact(start: int, end: int) -> bool:
        checksum = content[end : end + _CHECKSUM_BYTES]
        return bool(masked_crc32c(content[start:end]) == int.from_bytes(checksum, "little"))

    content = path.read_bytes()
    ends = [0]
    while is_intact(ends[-1], ends[-1] + _LENGTH_BYTES):
        length = int.from_bytes(content[ends[-1] : ends[-1] + _LENGTH_BYTES], "little")
        ends.append(ends[-1] + _LENGTH_BYTES + _CHECKSUM_BYTES + length + _CHECKSUM_BYTES)
    # All before the last one are followed by another.
    for before, end in zip(ends[-2::-1], ends[:0:-1], strict=True):
        start = before + _LENGTH_BYTES + _CHECKSUM_BYTES
        if end <= len(content) and is_intact(start, end - _CHECKSUM_BYTES):
            return Event.FromString(content[start : end - _CHECKSUM_BYTES]).step, end
    return 0, 0


def _values(row: Row) -> list[dict[str, Any]]:
    """Returns a row's summaries."""
    texts = [] if row.sample is None else [_text("eval/sample", row.sample)]
    return [*({"tag": name, "simple_value": x} for name, x in row.named().items()), *texts]


def _text(name: str, text: str) -> dict[str, Any]:
    """Returns a text as a summary's value: in Markdown, where indented lines are shown as they are."""
    indented = "".join(f"    {line}\n" for line in text.splitlines())
    return {
        "tag": f"{name}/text_summary",
        "metadata": {"plugin_data": {"plugin_name": "text"}},
        "tensor": {"dtype": "DT_STRING", "string_val": [indented.encode()], "tensor_shape": {"dim": [{"size": 1}]}},
    }
