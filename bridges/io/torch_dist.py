"""torch_dist checkpoints: megatron-core's own distributed format, in the folder layout its trainer reads.

OUT/latest_checkpointed_iteration.txt, OUT/iter_0000000/ (weights) and, ours, OUT/shardproof/ (settings, HF config and small files):
enough to rebuild the model or export it without the original folder.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import parallel
from ..errors import CheckpointError
from .files import companions, sync, sync_folder
from .output import Journal, digest
from .pieces import Piece, keys, pieces, state_of
from .sink import write_json
from .work import fill_together, first_cause, one_line

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


def held_values(piece: Piece) -> Any:
    """The values of a piece of a model that has them, in memory of exactly their size, which is what torch.save writes."""
    values = piece.view.cpu().contiguous()
    alone = values.untyped_storage().nbytes() == values.nbytes
    return values if alone else values.clone()


def save(
    chunks: list,
    path: str | Path,
    *,
    iteration: int = 0,
    record: dict | None = None,
    source: Path | None = None,
    overwrite: bool = False,
    values: Callable[[Piece], Any] = held_values,
    task: dict | None = None,
    wrote: Callable[[str], None] | None = None,
) -> None:
    """Save model chunks in megatron-core's format; every rank must call it, and writes what it is the first of all to hold.

    values: makes the tensor of a piece when it is written; chunks may be on meta then. task: what this is a conversion of; the same task goes on
    with the files of an interrupted one. wrote: called with each key. Written under a temporary name, hashed (megatron-core's
    ``verify_integrity`` checks it), renamed when complete; the iteration file comes last. Raises CheckpointError where the iteration exists or the
    disk is full; then nothing that loads is left.
    """
    path = Path(path)
    final, partial = path / f"iter_{iteration:07d}", path / f".iter_{iteration:07d}.partial"

    def work() -> list[dict]:
        return _write(chunks, partial, iteration, values, Journal(partial, parallel.rank()) if task else None, wrote)

    def finish(files: list[list[dict]]) -> None:
        _list_files(partial, [entry for mine in files for entry in mine])
        _finish(path, final, partial, iteration, record, source)

    fill_together(partial, task, name=str(final), before=lambda: _refuse_taken(path, final, overwrite), work=work, finish=finish)


def _write(chunks: list, folder: Path, iteration: int, values, journal: Journal | None, wrote) -> list[dict]:
    """Write this rank's files and, together, the metadata; what was written."""
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint import save as write

    from .dcp import Planner, Writer

    try:
        tensors, objects = pieces(chunks, objects=True)
    except CheckpointingException as wrong:
        raise CheckpointError(f"megatron-core refuses the sharded state dict: {wrong}") from wrong
    if parallel.rank() == 0:
        objects["common_state/shard_0_1"] = [{"checkpoint_version": 3.0, "iteration": iteration}]
    writer = Writer(folder, journal=journal, wrote=wrote)
    planner = Planner([p for p in tensors if p.main], objects, values)
    write({}, storage_writer=writer, planner=planner, no_dist=parallel.world_size() == 1)  # alone, plans need not travel
    return writer.files


def _list_files(folder: Path, files: list[dict]) -> None:
    """Write what says that the format is torch_dist, and megatron-core's list of SHA-256s."""
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
    from megatron.core.dist_checkpointing.validation import INTEGRITY_FNAME

    save_config(CheckpointingConfig("torch_dist"), str(folder))
    listed = {entry["file"]: entry["sha256"] for entry in files}
    listed |= {name: digest(folder / name) for name in (".metadata", "metadata.json")}
    write_json(folder / INTEGRITY_FNAME, {"algorithm": "sha256", "files": dict(sorted(listed.items()))})


def verified(folder: Path, share: tuple[int, int] = (0, 1)) -> int:
    """Compare an iteration's files with their SHA-256s; returns how many there are, 0 where no list was saved.

    share: (this rank, ranks): each rank takes its share. Raises CheckpointError naming the file that differs.
    """
    from megatron.core.dist_checkpointing.validation import INTEGRITY_FNAME

    try:
        listed = json.loads((folder / INTEGRITY_FNAME).read_text())
        files = dict(sorted(listed["files"].items()))
    except FileNotFoundError:
        return 0
    except (ValueError, KeyError, AttributeError) as broken:
        raise CheckpointError(f"{folder / INTEGRITY_FNAME} is damaged ({broken}); copy the checkpoint again") from None
    if listed.get("algorithm") != "sha256":
        raise CheckpointError(f"{folder / INTEGRITY_FNAME} lists {listed.get('algorithm')!r} digests; only sha256 is known")
    for number, (name, wanted) in enumerate(files.items()):
        if number % share[1] == share[0] and (not (folder / name).exists() or digest(folder / name) != wanted):
            raise CheckpointError(
                f"{folder / name} is not the file that was saved: its SHA-256 differs; copy the checkpoint again"
            )
    return len(files)


def load(chunks: list, path: str | Path) -> None:
    """Fill model chunks of any plan from a checkpoint saved under any plan. Raises CheckpointError naming what does not fit."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint.api import CheckpointException

    folder = iteration_folder(path)
    wanted = state_of(chunks)
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
        raise CheckpointError(f"{folder} cannot be loaded into this model: {one_line(first_cause(broken)[1])}") from broken
    for key, chunk in zip(keys(chunks), chunks, strict=True):
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


def _refuse_taken(path: Path, final: Path, overwrite: bool) -> None:
    taken = next((p for p in (final, path / LATEST) if p.exists()), None)
    if taken and not overwrite:
        raise CheckpointError(f"output {taken} exists; name a new folder or pass overwrite (--overwrite)")


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
