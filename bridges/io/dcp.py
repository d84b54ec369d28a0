"""Writing torch_dist: torch's distributed checkpointing with values that are made when their turn comes.

torch plans over the ranks and writes the metadata; here are the list of what a rank writes, and the files. A file holds entries as
``torch.save`` makes them, some gigabytes of them, and is on the disk and in the journal before the next one is begun.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from concurrent.futures import Future as Pending
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.serialization import get_crc32_options, set_crc32_options

from .output import Journal, Output
from .pieces import Piece, serialised
from .slices import SMALL, as_memory
from .stored import data_start

FILE_BYTES = 4 * 2**30  # a file is closed when it has so many
_FRAMED = SMALL  # bytes of a tensor whose archive is put together here: of many thousands, torch.save is most of the time


class Planner(DefaultSavePlanner):
    """Lists pieces and objects; `values` makes the contiguous CPU tensor of a piece when it is to be written."""

    def __init__(self, pieces: list[Piece], objects: dict[str, Any], values: Callable[[Piece], Any]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._values, self._objects = values, objects
        self._pieces = {(p.key, p.offset): p for p in pieces}

    def create_local_plan(self) -> SavePlan:
        """What this rank writes, tensors first."""
        tensors = [_tensor_item(piece) for piece in self._pieces.values()]
        objects = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._objects]
        self.plan = SavePlan(tensors + objects)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """The values of one entry."""
        index = write_item.index
        if write_item.type == WriteItemType.BYTE_IO:
            return serialised(self._objects[index.fqn])
        piece = self._pieces[index.fqn, tuple(index.offset)]
        return self._values(piece).view(piece.shape)


def _tensor_item(piece: Piece) -> WriteItem:
    offset, shape = torch.Size(piece.offset), torch.Size(piece.shape)
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(offsets=offset, sizes=shape),
        properties=TensorProperties(dtype=piece.view.dtype),
        size=torch.Size(piece.size),
    )
    return WriteItem(MetadataIndex(piece.key, offset), WriteItemType.SHARD, tensor_data=data)


class Writer(FileSystemWriter):
    """Writes this rank's entries one by one, with a journal where the work can be gone on with. `files`: what was written, with digests."""

    def __init__(self, folder: Path, *, journal: Journal | None = None, wrote: Callable[[str], None] | None = None):
        super().__init__(folder)
        self.folder, self._journal, self._wrote = folder, journal, wrote
        self.files: list[dict[str, Any]] = []

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The folder is there, and empty but for files of the journal."""
        return plan

    def write_data(self, plan: SavePlan, planner: DefaultSavePlanner) -> Future[list[WriteResult]]:
        """Write all entries; what the journal has is kept."""
        self.files = list(self._journal.entries) if self._journal else []
        kept = {(fqn, offset and tuple(offset)): (e["file"], at, n) for e in self.files for fqn, offset, at, n in e["entries"]}
        results, left = [], []
        for item in plan.items:
            where = kept.get((item.index.fqn, item.index.offset and tuple(item.index.offset)))
            if where:
                results.append(_result(item, *where))
            else:
                left.append(item)
        with ThreadPoolExecutor(2) as pool:
            results += self._write(left, plan.storage_data.prefix, planner, pool)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write(self, items: list[WriteItem], prefix: str, planner: DefaultSavePlanner, pool: ThreadPoolExecutor):
        results, number, pending, items = [], 0, None, iter(items)
        names = {entry["file"] for entry in self.files}
        item = next(items, None)
        while item is not None:
            while (name := f"{prefix}{number}.distcp") in names:
                number += 1
            names.add(name)
            file, entries = Output(self.folder / name, pool), []
            try:
                while item is not None and file.size < FILE_BYTES:
                    at = file.size
                    _save(planner.resolve_data(item), file)
                    offset = item.index.offset and list(item.index.offset)
                    entries.append((item.index.fqn, offset, at, file.size - at))
                    results.append(_result(item, name, at, file.size - at))
                    if self._wrote:
                        self._wrote(item.index.fqn)
                    item = next(items, None)
            except BaseException:
                file.close()
                raise
            self._record(pending)
            pending = (file.finish(), entries)
        self._record(pending)
        return results

    def _record(self, pending: tuple[Pending, list] | None) -> None:
        """Wait for a file that was finished while the next was written."""
        if pending is None:
            return
        done = pending[0].result() | {"entries": pending[1]}
        if self._journal:
            self._journal.add(done)
        self.files.append(done)


def _save(data: torch.Tensor | io.BytesIO, file: Output) -> None:
    if isinstance(data, io.BytesIO):
        file.write(data.getbuffer())
    elif data.nbytes > _FRAMED or not data.numel():
        _archive(data, file)
    else:
        front, back = _frame(tuple(data.shape), data.dtype)
        file.write(front, as_memory(data), back, lasting=True)


def _archive(data: torch.Tensor, file: Any) -> None:
    checked = get_crc32_options()
    set_crc32_options(False)  # half of torch.save's time; files have a SHA-256 each
    try:
        torch.save(data, file)
    finally:
        set_crc32_options(checked)


@lru_cache(maxsize=256)
def _frame(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What torch.save writes before and behind the values of such a tensor: without sums, archives of equal tensors differ in nothing else."""
    tensor = torch.empty(shape, dtype=dtype)
    stream = io.BytesIO()
    _archive(tensor, stream)
    with zipfile.ZipFile(stream) as entries:
        info = next(info for info in entries.infolist() if info.filename.endswith("/data/0"))
        start = data_start(stream, info)
    text = stream.getvalue()
    return text[:start], text[start + tensor.nbytes :]


def _result(item: WriteItem, file: str, at: int, size: int) -> WriteResult:
    return WriteResult(index=item.index, size_in_bytes=size, storage_data=_StorageInfo(file, at, size))
