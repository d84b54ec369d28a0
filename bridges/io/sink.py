"""Write Hugging Face weights: safetensors shards of a given size, streamed tensor by tensor, with index and config.

A shard's header is known before its first byte (names, shapes and dtypes follow from the architecture), so no tensor waits
in memory for its neighbours. The file format is safetensors' own: 8 bytes of header length, a JSON header, the tensors.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .files import companions
from .source import DTYPES, INDEX, SINGLE

_CODES = {name: code for code, name in DTYPES.items()} | {"float8_e4m3fn": "F8_E4M3"}
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str) -> int:
    """``"5GB"``, ``"200MB"`` or a number of bytes. Raises CheckpointError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if not found or found[2].upper() not in _UNITS or int(float(found[1]) * _UNITS[found[2].upper()]) < 1:
        raise CheckpointError(f"shard size {size!r} not understood; write e.g. 5GB or 500MiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


@dataclass(frozen=True)
class Entry:
    """One tensor to come."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        total = _BYTES[_CODES[self.dtype]]
        for n in self.shape:
            total *= n
        return total


def listed(tensors: Mapping[str, tuple[tuple[int, ...], Any]], copies: Mapping[str, Iterable[str]]) -> list[Entry]:
    """Entries of tensors, name -> (shape, torch dtype), in their order, each followed by those that repeat it."""
    entries = [Entry(name, shape, str(dtype).split(".")[-1]) for name, (shape, dtype) in tensors.items()]
    return [replace(entry, name=name) for entry in entries for name in (entry.name, *copies.get(entry.name, ()))]


def plan_shards(entries: Iterable[Entry], max_shard_size: int | str) -> list[list[Entry]]:
    """Fill shards in order; a tensor larger than the size has a shard of its own."""
    limit, shards, room = parse_size(max_shard_size), [], 0
    for entry in entries:
        if not shards or entry.nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(entry)
        room -= entry.nbytes
    return shards


def write_weights(folder: Path, entries: list[Entry], tensors: Iterable, *, max_shard_size: int | str = "5GB") -> None:
    """Write ``(name, tensor)`` pairs, in the order of `entries`, as shards with an index (one file if they fit in one).

    Raises CheckpointError where a tensor is not the one that `entries` announced.
    """
    shards, stream = plan_shards(entries, max_shard_size), iter(tensors)
    for name, shard in named(shards).items():
        with open(folder / name, "wb") as file:
            write_shard(file.write, shard, stream)
    left = next(stream, None)
    if left is not None:
        raise CheckpointError(f"tensor {left[0]!r} came after the last announced one")
    write_index(folder, shards)


def named(shards: list[list[Entry]]) -> dict[str, list[Entry]]:
    """File name -> shard, as transformers names them."""
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, 1)}


def write_index(folder: Path, shards: list[list[Entry]]) -> None:
    """Write which tensor is in which file, where there are several files."""
    if len(shards) == 1:
        return
    weight_map = {entry.name: name for name, shard in named(shards).items() for entry in shard}
    total = sum(entry.nbytes for shard in shards for entry in shard)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def write_shard(write: Callable[[Any], Any], shard: list[Entry], stream: Iterator) -> None:
    """Write one shard, its tensors from `stream` in its order, with a file's `write`. Raises CheckpointError where another tensor comes."""
    write(header(shard))
    for entry in shard:
        name, tensor = next(stream, (None, None))
        got = (
            name,
            None if tensor is None else tuple(tensor.shape),
            None if tensor is None else str(tensor.dtype).split(".")[-1],
        )
        if got != (entry.name, entry.shape, entry.dtype):
            raise CheckpointError(f"expected tensor {entry} next, got {got}")
        write(as_bytes(tensor))


def header(shard: list[Entry]) -> bytes:
    """What a file begins with: the length of a JSON text, and that, with the place of every tensor."""
    entries: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in shard:
        entries[entry.name] = {
            "dtype": _CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def as_bytes(tensor) -> memoryview:
    """A tensor's values as bytes, without a copy where it is contiguous on the CPU."""
    import torch

    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def write_json(path: Path, value: Mapping) -> None:
    """Write JSON as transformers does: two spaces, a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_companions(folder: Path, source: Path | None, config: Mapping) -> None:
    """Carry the source's small files over, then write config.json: last, so that a folder without it is unfinished."""
    for path in companions(source) if source else ():
        shutil.copyfile(path, folder / path.name)
    write_json(folder / "config.json", config)
