"""Whole conversions of files, streamed: what `AutoBridge.import_ckpt`, `export_ckpt` and the command line run, on one rank or many."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import importer, parallel
from .io import torch_dist
from .io.files import refuse_taken, take_place
from .io.output import Journal, Output
from .io.quant.writing import Quantising
from .io.sink import Entry, listed, named, plan_shards, write_companions, write_index, write_shard
from .io.slices import SMALL
from .io.stored import StoredTensors
from .io.work import fill_together
from .meta import on_meta, uncollected
from .plan import ParallelPlan
from .streaming import Filled, Whole

if TYPE_CHECKING:
    from .architecture import Architecture
    from .auto import AutoBridge

Wrote = Callable[[str], None]


def empty_chunks(bridge: AutoBridge, plan: ParallelPlan | str = "", *, dtype: Any = None) -> list:
    """This rank's model chunks under a plan, on meta, of the type that a loading provider takes (or of `dtype`)."""
    provider = bridge.to_megatron_provider(load_weights=False).apply(plan)
    provider.params_dtype = dtype or bridge.to_megatron_provider().params_dtype
    provider.filled = True
    with uncollected():
        provider.finalize()
        parallel.ensure(provider.plan)
        with on_meta():
            return provider.provide_distributed_model(wrap_with_ddp=False)


def import_folder(
    bridge: AutoBridge, path: str | Path, *, plan: ParallelPlan | str = "", overwrite: bool = False, wrote: Wrote | None = None
) -> int:
    """The bridge's Hugging Face folder -> torch_dist checkpoint; returns the bytes that this rank read.

    Every rank of the plan calls it and writes its own part, reading the bytes of that part alone. Memory: one Megatron tensor. An interrupted
    import goes on where it stopped when it is called again with the same files, plan and versions. wrote: called with each key.
    Raises CheckpointError, ConfigError, CoverageError, PlanError.
    """
    chunks = empty_chunks(bridge, plan)
    architecture = bridge.live(chunks)
    importer.check_source(bridge.source, architecture, bridge.left_out(architecture))
    torch_dist.save(
        chunks,
        path,
        record=bridge.record(chunks),
        source=bridge.folder,
        overwrite=overwrite,
        values=Filled(chunks, bridge.source, architecture),
        task=_task(bridge, bridge.folder, "*.safetensors", plan=str(plan)),
        wrote=wrote,
    )
    return bridge.source.bytes_read


def export_folder(
    bridge: AutoBridge,
    saved: str | Path,
    path: str | Path,
    *,
    plan: ParallelPlan | str = "",
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    quantize: str | None = None,
    verify: bool = True,
    wrote: Wrote | None = None,
) -> int:
    """A torch_dist checkpoint, saved under any plan, by anyone -> complete Hugging Face folder; returns the number of its tensors.

    Ranks that run share the files; none holds more than one tensor. plan: what parallel_state runs, where it does. verify: compare the
    checkpoint's files with their SHA-256 meanwhile, where it has a list of them. quantize: as `save_hf_pretrained`. An interrupted export goes
    on where it stopped. Raises CheckpointError, ConfigError, CoverageError.
    """
    folder, path = torch_dist.iteration_folder(saved), Path(path)
    chunks = empty_chunks(bridge, plan, dtype=bridge.dtype_of(saved))
    architecture = bridge.live(chunks)
    whole = Whole(chunks, StoredTensors(folder), architecture, bridge.stored_dtypes())
    entries, value, config = _listing(bridge, architecture, whole, quantize, bridge.hf_config_for(chunks))
    shards = plan_shards(entries, max_shard_size)
    partial = path.parent / f".{path.name}.partial"

    def work() -> None:
        with ThreadPoolExecutor(3) as pool:
            sums = pool.submit(torch_dist.verified, folder, _share()) if verify else None
            _write_files(named(shards), value, partial, pool, wrote)
            if sums:
                sums.result()

    def finish(_: list) -> None:
        write_index(partial, shards)
        write_companions(partial, bridge.folder, config)
        take_place(partial, path)

    task = _task(bridge, folder, "*", shard=str(max_shard_size), quantize=quantize)
    fill_together(partial, task, name=str(path), before=lambda: refuse_taken(path, overwrite), work=work, finish=finish)
    return len(entries)


def _listing(
    bridge: AutoBridge, architecture: Architecture, whole: Whole, quantize: str | None, config: dict[str, Any]
) -> tuple[list[Entry], Callable[[str], Any], dict[str, Any]]:
    """(what will be written, the maker of one of these tensors, config.json)."""
    copies = bridge.listed_copies(architecture)
    entries = listed(whole.entries, copies)
    origin = {copy: name for name, names in copies.items() for copy in names}
    if not quantize:
        return entries, lambda name: whole(origin.get(name, name)), config
    again, made = Quantising(quantize, architecture, bridge.hf_config), {}
    of = {e.name: entry.name for entry in entries for e in again.entries([entry])}

    def value(name: str) -> Any:
        if name not in made:  # a weight and its scales are made together
            made.clear()
            made.update(again.tensors([(of[name], whole(origin.get(of[name], of[name])))]))
        return made[name]

    return again.entries(entries), value, again.config(config)


def _write_files(files: dict[str, list[Entry]], value, folder: Path, pool: ThreadPoolExecutor, wrote: Wrote | None) -> None:
    """Write this rank's share of the files, those that the journal has apart."""
    journal, (rank, ranks) = Journal(folder, parallel.rank()), _share()
    done, pending = {entry["file"] for entry in journal.entries}, None
    for number, (name, shard) in enumerate(files.items()):
        if number % ranks != rank or name in done:
            continue
        file = Output(folder / name, pool, "crc32")  # for the journal alone
        try:
            write_shard(lambda data, to=file: to.write(data, lasting=len(data) <= SMALL), shard, _made(shard, value, wrote))
        except BaseException:
            file.close()
            raise
        if pending:
            journal.add(pending.result())
        pending = file.finish()
    if pending:
        journal.add(pending.result())


def _made(shard: list[Entry], value: Callable[[str], Any], wrote: Wrote | None) -> Iterator[tuple[str, Any]]:
    for entry in shard:
        yield entry.name, value(entry.name)
        if wrote:
            wrote(entry.name)


def _share() -> tuple[int, int]:
    return parallel.rank(), parallel.world_size()


def _task(bridge: AutoBridge, folder: Path, pattern: str, **settings: Any) -> dict[str, Any]:
    """What a conversion is of: an interrupted one is gone on with where nothing of this has changed."""
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.glob(pattern)) if p.is_file()]
    config = hashlib.sha256(json.dumps(bridge.hf_config, sort_keys=True, default=str).encode()).hexdigest()
    versions = {name: version(name) for name in ("shardproof", "megatron-core", "torch")}
    return {"files": files, "config": config, "versions": versions, **settings}
