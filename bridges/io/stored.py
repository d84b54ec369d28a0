"""Reading torch_dist: any box of any tensor of a checkpoint, whoever wrote it under whatever plan, with the bytes of that box alone.

Each stored part is an archive of ``torch.save``. What the archive says of the tensor is read once; its values lie uncompressed in the file
and are read from there.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from .slices import Reader, as_memory, runs, shared

_LOCAL_HEADER = 30  # bytes of a zip entry before its name


@dataclass(frozen=True, slots=True)
class Part:
    """One stored part of a tensor: its box, and the file's bytes that hold its archive."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    at: int
    length: int


class StoredTensors:
    """The tensors of one iteration folder. Raises CheckpointError for metadata or archives that cannot be read."""

    def __init__(self, folder: Path):
        from torch.distributed.checkpoint import FileSystemReader

        self.folder = folder
        try:
            metadata = FileSystemReader(folder).read_metadata()
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ValueError) as broken:
            raise CheckpointError(f"{folder}/.metadata is damaged ({broken}); save the checkpoint again") from None
        self.sizes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, Any] = {}
        self._parts: dict[str, list[Part]] = {}
        for key, tensor in metadata.state_dict_metadata.items():
            if hasattr(tensor, "properties"):
                self.sizes[key], self.dtypes[key], self._parts[key] = tuple(tensor.size), tensor.properties.dtype, []
        boxes = {(key, tuple(chunk.offsets)): tuple(chunk.sizes) for key in self.sizes for chunk in _chunks(metadata, key)}
        for index, place in metadata.storage_data.items():
            shape = boxes.get((index.fqn, tuple(index.offset))) if index.offset is not None else None
            if shape is not None:
                part = Part(tuple(index.offset), shape, place.relative_path, place.offset, place.length)
                self._parts[index.fqn].append(part)
        self._bounds: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._files: dict[str, Reader] = {}
        self._values: dict[tuple[str, int], int | None] = {}

    def read(self, key: str, first: tuple[int, ...], target: Any) -> None:
        """Fill a tensor with the box that begins at `first`; `target` has as many axes as the stored tensor. Values are cast to its type.

        Raises CheckpointError where the checkpoint lacks a part of the box.
        """
        missing, size = target.numel(), tuple(target.shape)
        for part in self._touching(key, first, size):
            if both := shared(first, size, part.offset, part.shape):
                here, there = both
                region = target[here]
                self._read(key, part, there, region)
                missing -= region.numel()
        if missing:
            raise CheckpointError(f"{self.folder} lacks {missing} of {target.numel()} elements of {key} from {list(first)} on")

    def _touching(self, key: str, first: tuple[int, ...], size: tuple[int, ...]) -> list[Part]:
        """The parts that a box may have something of; a key may have thousands (experts of all layers), and be asked as often."""
        parts = self._parts.get(key, [])
        if not parts:
            return []
        if key not in self._bounds:
            begin = np.array([part.offset for part in parts]).reshape(len(parts), -1)
            self._bounds[key] = begin, begin + np.array([part.shape for part in parts]).reshape(begin.shape)
        begin, end = self._bounds[key]
        low = np.array(first, dtype=begin.dtype)
        found = ((begin < low + np.array(size, dtype=begin.dtype)) & (end > low)).all(axis=1)
        return [parts[n] for n in found.nonzero()[0]]

    def _read(self, key: str, part: Part, where: tuple[slice, ...], region: Any) -> None:
        import torch

        start, dtype = self._start(key, part), self.dtypes[key]
        if start is None:
            region.copy_(self._loaded(part)[where])
            return
        straight = region.device.type == "cpu" and region.is_contiguous() and region.dtype == dtype
        values = region if straight else torch.empty(region.shape, dtype=dtype)
        firsts, length, _ = runs(part.shape, where)
        size = values.element_size()
        self._file(part.file).fill_runs(as_memory(values), start, firsts * size, length * size)
        if not straight:
            region.copy_(values)

    def _file(self, name: str) -> Reader:
        if name not in self._files:
            try:
                self._files[name] = Reader(self.folder / name)
            except OSError as lost:
                raise CheckpointError(
                    f"{self.folder / name} cannot be opened ({lost.strerror}); copy the checkpoint again"
                ) from None
        return self._files[name]

    def _start(self, key: str, part: Part) -> int | None:
        """Where the values of a part begin in its file, row after row; None where they lie there otherwise."""
        if (part.file, part.at) not in self._values:
            archive = _View(self._file(part.file), part)
            try:
                found = _values_of(archive, part, self.dtypes[key])
            except (zipfile.BadZipFile, KeyError, ValueError, EOFError, CheckpointError) as broken:
                raise CheckpointError(f"{self.folder / part.file}: the entry of {key} is damaged ({broken})") from None
            self._values[part.file, part.at] = found
        return self._values[part.file, part.at]

    def _loaded(self, part: Part) -> Any:
        import torch

        try:
            return torch.load(_View(self._file(part.file), part), map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as broken:
            raise CheckpointError(f"{self.folder / part.file}: an entry at {part.at} cannot be loaded ({broken})") from None


def _chunks(metadata: Any, key: str) -> list:
    return metadata.state_dict_metadata[key].chunks


class _View(io.RawIOBase):
    """The bytes of one entry as a file."""

    def __init__(self, reader: Reader, part: Part):
        super().__init__()
        self._reader, self._part, self._at = reader, part, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._part.length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        memory = memoryview(buffer).cast("B")
        memory = memory[: max(0, min(len(memory), self._part.length - self._at))]
        self._reader.fill(memory, self._part.at + self._at)
        self._at += len(memory)
        return len(memory)


def _values_of(archive: _View, part: Part, dtype: Any) -> int | None:
    with zipfile.ZipFile(archive) as entries:
        names = {name.partition("/")[2]: name for name in entries.namelist()}
        info = entries.getinfo(names["data/0"]) if "data/0" in names else None
        try:
            said = _Said(io.BytesIO(_content(archive, entries.getinfo(names["data.pkl"])))).load()
        except pickle.UnpicklingError:  # another kind of tensor: torch reads it whole
            return None
    if info is None or info.compress_type != zipfile.ZIP_STORED or not isinstance(said, tuple) or len(said) != 3:
        return None
    first, shape, stride = said
    dense = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    plain = all(n == 1 or a == b for n, a, b in zip(shape, stride, dense, strict=True))
    if tuple(shape) != part.shape or not plain or info.file_size < (first + math.prod(shape)) * dtype.itemsize:
        return None
    return part.at + data_start(archive, info) + first * dtype.itemsize


def data_start(archive: io.IOBase, info: zipfile.ZipInfo) -> int:
    """Where the bytes of an archive's entry begin."""
    archive.seek(info.header_offset)
    header = archive.read(_LOCAL_HEADER)
    return info.header_offset + _LOCAL_HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def _content(archive: _View, info: zipfile.ZipInfo) -> bytes:
    """A stored entry's bytes; zipfile's own reading would insist on the CRC that fast writers leave out."""
    archive.seek(data_start(archive, info))
    return archive.read(info.file_size)


class _Said(pickle.Unpickler):
    """What an archive says of its tensor, (first element, shape, stride): nothing but a plain tensor is understood, and nothing is run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, first, shape, stride, *rest: (first, tuple(shape), tuple(stride))
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"{module}.{name} is no tensor's")

    def persistent_load(self, pid: Any) -> Any:
        return pid
