"""Files that are written once, from the front: summed up on the way, runs of zeros left as holes, on the disk when `finish` says so.

And the journal of a conversion: which files are complete, so that an interrupted one goes on where it stopped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BridgeError, CheckpointError

_SMALL = 2**16  # bytes below which writes wait for each other
_BLOCK = 2**20  # bytes that are left out together where all are zero
_STATE, _LIST = "conversion.json", "files-{}.jsonl"


class Crc32:
    """CRC-32 with hashlib's methods: half the work of SHA-256, against accidents alone."""

    def __init__(self):
        self._sum = 0

    def update(self, data: Any) -> None:
        """Take more bytes."""
        self._sum = zlib.crc32(data, self._sum)

    def hexdigest(self) -> str:
        """The sum of all bytes so far."""
        return f"{self._sum:08x}"


SUMS = {"sha256": hashlib.sha256, "crc32": Crc32}


class Output:
    """One file, with a sum of SUMS. Raises OSError as the disk does."""

    def __init__(self, path: Path, pool: ThreadPoolExecutor, kind: str = "sha256"):
        self.path, self._pool, self._kind = path, pool, kind
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._sum, self._small, self.size = SUMS[kind](), bytearray(), 0
        self._summing: Future | None = None

    def write(self, *data: Any, lasting: bool = False) -> int:
        """Append bytes; how many. They are free to change when it returns; lasting ones, which are summed up meanwhile, in the next call."""
        self._summed()
        before = self.size
        for memory in (memoryview(part).cast("B") for part in data):
            self.size += len(memory)
            if len(memory) < _SMALL:
                self._small += memory
            else:
                self.flush()
                self._append(memory)
        if len(self._small) >= _BLOCK:
            self.flush()
        if not lasting:
            self._summed()
        return self.size - before

    def flush(self) -> None:
        """Write what is waiting to be written together."""
        if self._small:
            waiting, self._small = self._small, bytearray()
            self._append(memoryview(waiting))

    def finish(self) -> Future[dict[str, Any]]:
        """Close it; the future has its name, size and sum once all is on the disk."""
        self.flush()
        self._summed()
        return self._pool.submit(self._finish)

    def close(self) -> None:
        """Give it up unfinished."""
        self._summed()
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _append(self, memory: memoryview) -> None:
        self._summed()
        self._summing = self._pool.submit(self._sum.update, memory)
        for first in range(0, len(memory), _BLOCK):
            self._put(memory[first : first + _BLOCK])

    def _summed(self) -> None:
        """Wait until the bytes before are summed up."""
        if self._summing:
            self._summing.result()
            self._summing = None

    def _put(self, block: memoryview) -> None:
        if len(block) == _BLOCK and not any(block[:64]) and not np.frombuffer(block, np.uint64).any():
            os.lseek(self._handle, _BLOCK, os.SEEK_CUR)
            return
        while block:
            block = block[os.write(self._handle, block) :]

    def _finish(self) -> dict[str, Any]:
        try:
            os.ftruncate(self._handle, self.size)  # a hole at the end is part of the file
            os.fsync(self._handle)
        finally:
            self.close()
        return {"file": self.path.name, "size": self.size, self._kind: self._sum.hexdigest()}


def digest(path: Path, kind: str = "sha256") -> str:
    """The sum of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, SUMS[kind]).hexdigest()


class Journal:
    """The files of one rank that are complete, beside them in a folder that has no name yet."""

    def __init__(self, folder: Path, rank: int):
        self.folder, self._file = folder, folder / _LIST.format(rank)
        self.entries = [entry for entry in self._listed() if self._whole(entry)]
        self._write()

    def add(self, entry: dict[str, Any]) -> None:
        """Record a finished file."""
        self.entries.append(entry)
        self._write()

    def _write(self) -> None:
        partial = self._file.with_suffix(".partial")
        with open(partial, "w") as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in self.entries))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self._file)

    def _listed(self) -> list[dict[str, Any]]:
        try:
            return [json.loads(line) for line in self._file.read_text().splitlines()]
        except (FileNotFoundError, ValueError):
            return []

    def _whole(self, entry: dict[str, Any]) -> bool:
        path = self.folder / entry["file"]
        kind = next((kind for kind in SUMS if kind in entry), None)
        return path.exists() and path.stat().st_size == entry["size"] and kind and digest(path, kind) == entry[kind]


@contextmanager
def unfinished(folder: Path, task: dict[str, Any] | None) -> Iterator[bool]:
    """A folder to fill, made or found again; yields whether it was found with the same `task` (JSON), whose files then count.

    One process holds it at a time (rank 0 for all). What fails removes it; an interruption (Ctrl-C, a kill) leaves it for the next run. task:
    None for work that cannot be gone on with. Raises CheckpointError where another process writes there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _STATE, "a+") as state:
        try:
            fcntl.flock(state, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"another process is writing {folder}; wait for it, or end it") from None
        state.seek(0)
        text = json.dumps(task, sort_keys=True)
        found = task is not None and state.read() == text
        if not found:
            _empty(folder)
            state.truncate(0)
            state.write(text)
            state.flush()
        try:
            yield found
        except (BridgeError, OSError):
            shutil.rmtree(folder, ignore_errors=True)
            raise


def clear(folder: Path) -> None:
    """Take the notes of the conversion out of a folder that is complete."""
    for path in [folder / _STATE, *folder.glob(_LIST.format("*"))]:
        path.unlink(missing_ok=True)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != _STATE:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
