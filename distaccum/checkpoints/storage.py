"""Storage for `torch.distributed.checkpoint`: one safetensors file per rank, and a manifest in JSON.

torch's own file storage pickles its metadata, and what is unpickled can run code. Here shapes, offsets and hashes are
JSON, and tensors lie in the safetensors format: a length (8 bytes, little-endian), a header in JSON, raw bytes. Files
are written in pieces through Python's own `write`, which lets other threads run meanwhile: the training doesn't wait
for the disk.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from distaccum.checkpoints.folder import Checkpoint, commit, start_writing, write_manifest, writing_path
from distaccum.checkpoints.form import FORMAT, SAFETENSORS_NAMES
from distaccum.errors import UserError
from distaccum.runtime.files import open_regular, sync

_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in SAFETENSORS_NAMES}
_SAFETENSORS_NAMES = {dtype: SAFETENSORS_NAMES[name] for name, dtype in _DTYPES.items()}
_CHUNK_BYTES = 4 << 20


def file_of(rank: int) -> str:
    """The name of the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], whole: Callable[[Tensor], Tensor] = Tensor.detach
) -> tuple[int, str]:
    """Writes tensors into a new file and brings them to the disk.

    Args:
        whole: returns the numbers of a tensor; it is called for one after another, when they are written.

    Returns:
        The file's size in bytes and its hash (BLAKE2b of 16 bytes, hexadecimal).

    Raises:
        TypeError: safetensors has no name for the format of a tensor.
        OSError: the disk is full, …
    """
    # Readers like transformers' require the note that the tensors are torch's.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _SAFETENSORS_NAMES:
            raise TypeError(f"{name} is of format {tensor.dtype}, for which checkpoints have no name")
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    digest, size = hashlib.blake2b(digest_size=16), 0
    with path.open("xb", buffering=0) as file:
        head = len(text).to_bytes(8, "little") + text
        for chunk in _chunks(itertools.chain((head,), (_bytes_of(whole(tensor)) for tensor in tensors.values()))):
            digest.update(chunk)
            size += len(chunk)
            while len(chunk):
                chunk = chunk[file.write(chunk) :]
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def _chunks(parts: Iterable[Any]) -> Iterator[memoryview]:
    """Yields the bytes of parts, large ones in several pieces, and small ones together.

    Parts are taken one after another, as tensors of a GPU are copied to the CPU then.
    """
    small = bytearray()
    for part in parts:
        view = memoryview(part)
        if len(view) < _CHUNK_BYTES // 16:
            small += view
            if len(small) < _CHUNK_BYTES:
                continue
            view = memoryview(b"")
        if small:
            yield memoryview(bytes(small))
            small.clear()
        for start in range(0, len(view), _CHUNK_BYTES):
            yield view[start : start + _CHUNK_BYTES]
    if small:
        yield memoryview(bytes(small))


def check_formats(tensors: Mapping[str, Any]) -> None:
    """Refuses tensors that can't be saved, before the training begins.

    Args:
        tensors: of the model and of the optimizer, by name; anything else among them is passed over.

    Raises:
        UserError: one is sparse, or of a format for which safetensors has no name here.
    """
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and (tensor.dtype not in _SAFETENSORS_NAMES or tensor.layout != torch.strided):
            kind = str(tensor.dtype if tensor.layout == torch.strided else tensor.layout).removeprefix("torch.")
            raise UserError(
                f"{name} of the model is of format {kind}, which checkpoints can't "
                "hold. Make it a buffer with persistent=False if it need not be saved, or set checkpoint.enabled=false."
            )


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


class _OfOneCheckpoint:
    """Methods that torch requires for storage of several checkpoints with plans of its own; neither is used here."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan

    def prepare_global_plan(self, plans: Any) -> Any:
        return plans


class SavePlannerOf(DefaultSavePlanner):
    """Plans the saving of tensors that `torch.distributed.checkpoint.save` isn't given itself.

    For each tensor that it is given, it makes an identifier and two log records, which nobody reads and which take a
    quarter of the time of saving many small tensors.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._tensors = dict(tensors)

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        super().set_up_planner(self._tensors, storage_meta, is_coordinator)


@dataclass
class ManifestWriter(_OfOneCheckpoint, StorageWriter):
    """Writes one checkpoint and gives it its name at the end.

    Attributes:
        folder: folder of all checkpoints of the run.
        update: the update that it is made after.
        rank: of this process.
        state: what is saved besides tensors, as JSON has it; rank 0's counts.
        files: other files of the run that belong to the checkpoint; they are brought to the disk before it counts.
    """

    folder: Path
    update: int
    rank: int
    state: Mapping[str, Any]
    files: Sequence[Path] = ()

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        start_writing(self.folder, self.update)  # on rank 0 alone, before anybody writes
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        done: Future[list[WriteResult]] = Future()
        done.set_result(self._written(plan, planner) if plan.items else [])
        return done

    def _written(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        # A rank may hold several pieces of one tensor; the name of a piece is its tensor's and where it begins.
        items = {f"{item.index.fqn}@{','.join(map(str, item.index.offset or ()))}": item for item in plan.items}
        tensors: dict[str, Any] = {key: planner.resolve_data(item) for key, item in items.items()}
        file = file_of(self.rank)
        size, digest = write_safetensors(writing_path(self.folder, self.update) / file, tensors)
        # What `finish` puts into the manifest: the place of the piece, and the file.
        about = {"bytes": size, "blake2b": digest}
        return [
            WriteResult(item.index, tensors[key].nbytes, ({"file": file, "key": key}, about))
            for key, item in items.items()
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        manifest = self.manifest_of(metadata, results)
        self.sync_files()
        writing = writing_path(self.folder, self.update)
        write_manifest(writing, manifest)
        commit(writing, self.update)

    def sync_files(self) -> None:
        """Brings other files of the run to the disk."""
        for path in self.files:
            if path.exists():
                sync(path)

    def manifest_of(self, metadata: Metadata, results: list[list[WriteResult]]) -> dict[str, Any]:
        """Returns the manifest, from what all ranks have written."""
        written = {(r.index.fqn, tuple(r.index.offset or ())): r.storage_data for part in results for r in part}
        tensors = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            chunks = [
                {"offsets": list(c.offsets), "shape": list(c.sizes), **written[name, tuple(c.offsets)][0]}
                for c in entry.chunks
            ]
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            tensors[name] = {"dtype": dtype, "shape": list(entry.size), "chunks": chunks}
        files = {place["file"]: about for place, about in written.values()}
        return {
            "format": FORMAT,
            "update": self.update,
            "state": self.state,
            "tensors": tensors,
            "files": files,
            "torch": torch.__version__,
        }


class ManifestReader(_OfOneCheckpoint, StorageReader):
    """Reads tensors of a checkpoint, whatever ranks wrote it and whatever ranks read it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._path = checkpoint.path
        self._tensors: dict[str, Any] = checkpoint.manifest["tensors"]

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=_DTYPES[entry["dtype"]]),
                    torch.Size(entry["shape"]),
                    [ChunkStorageMetadata(torch.Size(c["offsets"]), torch.Size(c["shape"])) for c in entry["chunks"]],
                )
                for name, entry in self._tensors.items()
            }
        )

    def formats(self) -> dict[str, tuple[list[int], torch.dtype]]:
        """Shape and format of all tensors, by name."""
        return {name: (entry["shape"], _DTYPES[entry["dtype"]]) for name, entry in self._tensors.items()}

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            index = item.storage_index
            chunks = self._tensors[index.fqn]["chunks"]
            chunk = next(chunk for chunk in chunks if chunk["offsets"] == list(index.offset or ()))
            by_file.setdefault(chunk["file"], []).append((item, chunk["key"]))
        for name, reads in by_file.items():
            open_regular(self._path / name).close()
            with safe_open(self._path / name, framework="pt") as file:
                for item, key in reads:
                    ends = (start + length for start, length in zip(item.storage_offsets, item.lengths, strict=True))
                    piece = tuple(slice(start, end) for start, end in zip(item.storage_offsets, ends, strict=True))
                    stored = file.get_slice(key)[piece] if piece else file.get_tensor(key)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(stored)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done
