"""torch_dist checkpoints: megatron-core's own distributed format, in the folder layout its trainer reads.

OUT/latest_checkpointed_iteration.txt, OUT/iter_0000000/ (weights) and, ours, OUT/shardproof/ (settings, HF config and small files):
enough to rebuild the model or export it without the original folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
from pathlib import Path

from .. import host, parallel
from ..errors import CheckpointError
from .files import companions, sync, sync_folder
from .sink import write_json

LATEST, RECORD = "latest_checkpointed_iteration.txt", "shardproof"


def iteration_folder(path: str | Path) -> Path:
    """The newest iteration of a checkpoint. Raises CheckpointError where there is none, or it is unfinished."""
    path = Path(path)
    try:
        text = (path / LATEST).read_text().strip()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is no finished torch_dist checkpoint: it has no {LATEST}") from None
    if text != "release" and not text.isdecimal():
        raise CheckpointError(f"{path / LATEST} says {text!r}, which is no iteration: the save was cut off; save it again")
    folder = path / (text if text == "release" else f"iter_{int(text):07d}")
    if not (folder / ".metadata").exists():
        raise CheckpointError(f"{folder} has no .metadata: the save was cut off; save it again")
    return folder


def save(
    chunks: list, path: str | Path, *, iteration: int = 0, record: dict | None = None, source: Path | None = None, overwrite=False
) -> None:
    """Save model chunks with megatron-core's dist_checkpointing; every rank must call it.

    Written under a temporary name and renamed when complete; the iteration file comes last. Raises CheckpointError where the iteration
    exists or the disk is full; then nothing that loads is left.
    """
    path = Path(path)
    final, partial = path / f"iter_{iteration:07d}", path / f".iter_{iteration:07d}.partial"
    problem = None
    if parallel.rank() == 0:
        problem = _prepare(path, final, partial, overwrite)
    if problem := parallel.broadcast_object(problem):
        raise CheckpointError(problem)
    from torch.distributed.checkpoint.api import CheckpointException  # a BaseException: what a writer thread met, on every rank

    failed = None
    try:
        _write(chunks, partial, iteration)
    except (OSError, RuntimeError, CheckpointException) as full:
        failed = f"writing {final} failed ({_cause(full)}); nothing was left there"
    failures = [f for f in parallel.all_gather_object(failed) if f]
    if parallel.rank() == 0:
        try:
            if not failures:
                _finish(path, final, partial, iteration, record, source)
        except OSError as full:
            failures = [f"writing {path} failed ({full}); nothing that loads was left there"]
        if failures:
            shutil.rmtree(partial, ignore_errors=True)
            with contextlib.suppress(OSError):  # empty where it was made for this save
                path.rmdir()
    if failures := parallel.broadcast_object(failures):
        raise CheckpointError(failures[0])


def _cause(error: BaseException) -> str:
    """The first failure that torch's CheckpointException collects, in one line; any other error's own text."""
    failures = getattr(error, "failures", None)
    found = next(iter(failures.values()))[0] if failures else error
    return str(found).strip().splitlines()[0] if str(found).strip() else type(found).__name__


def load(chunks: list, path: str | Path) -> None:
    """Fill model chunks of any plan from a checkpoint saved under any plan. Raises CheckpointError naming what does not fit."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint.api import CheckpointException

    folder = iteration_folder(path)
    wanted = _state(chunks)
    damaged = (
        CheckpointingException,
        CheckpointException,
        KeyError,
        ValueError,
        RuntimeError,
        OSError,
        EOFError,
        pickle.UnpicklingError,
    )
    try:
        state = dist_checkpointing.load(wanted, str(folder))
    except damaged as broken:
        raise CheckpointError(f"{folder} cannot be loaded into this model: {_cause(broken)}") from broken
    for key, chunk in zip(_keys(chunks), chunks, strict=True):
        chunk.load_state_dict(state[key], strict=True)


def stored_dtype(path: str | Path) -> str:
    """Torch dtype name of a checkpoint's weights: the commonest among its tensors. Raises CheckpointError."""
    from collections import Counter

    from torch.distributed.checkpoint import FileSystemReader

    tensors = FileSystemReader(iteration_folder(path)).read_metadata().state_dict_metadata.values()
    names = Counter(str(t.properties.dtype).split(".")[-1] for t in tensors if hasattr(t, "properties"))
    return names.most_common(1)[0][0] if names else "float32"


def read_record(path: str | Path) -> dict:
    """Settings and HF config saved beside the weights. Raises CheckpointError where the checkpoint has none."""
    try:
        return json.loads((Path(path) / RECORD / "shardproof_model.json").read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} has no {RECORD}/shardproof_model.json: it was not saved by this bridge; pass the Hugging Face folder too"
        ) from None


def _keys(chunks: list) -> list[str]:
    return ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]


def _state(chunks: list) -> dict:
    from megatron.core import parallel_state as ps

    metadata = {"dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True), "singleton_local_shards": False}
    return {key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in zip(_keys(chunks), chunks, strict=True)}


def _prepare(path: Path, final: Path, partial: Path, overwrite: bool) -> str | None:
    taken = next((p for p in (final, path / LATEST) if p.exists()), None)
    if taken and not overwrite:
        return f"output {taken} exists; name a new folder or pass overwrite (--overwrite)"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as broken:
        return f"cannot write to {path}: {broken}"
    return None


def _write(chunks: list, partial: Path, iteration: int) -> None:
    from megatron.core import dist_checkpointing

    with host.local_results_queue():
        dist_checkpointing.save({**_state(chunks), "checkpoint_version": 3.0, "iteration": iteration}, str(partial))


def _finish(path: Path, final: Path, partial: Path, iteration: int, record: dict | None, source: Path | None) -> None:
    sync(partial)
    if final.exists():
        (path / LATEST).unlink(missing_ok=True)
        shutil.rmtree(final)
    if record is not None:
        _write_record(path / RECORD, record, source)
    os.replace(partial, final)
    latest = path / f".{LATEST}.partial"
    latest.write_text(str(iteration))
    sync_folder(path)
    os.replace(latest, path / LATEST)
    sync_folder(path)


def _write_record(folder: Path, record: dict, source: Path | None) -> None:
    files = [(p, p.read_bytes()) for p in companions(source)] if source else []
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path, content in files:
        (folder / path.name).write_bytes(content)
    write_json(folder / "shardproof_model.json", record)
