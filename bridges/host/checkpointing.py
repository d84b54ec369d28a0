"""Saving megatron's torch_dist checkpoints from a daemonic worker."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def local_results_queue() -> Iterator[None]:
    """Let ``dist_checkpointing.save`` use an in-process queue while the context is open.

    Megatron's writer collects its results through a queue served by a Manager process, which it spawns in a synchronous save
    too, although all its writers are threads then. A daemonic process may have no children, and the ranks of a pool are
    daemonic. The queue is a module global that is made when absent: giving it a plain `queue.Queue` is enough. This is the one
    place where a megatron global is set, so it is put back on leaving. Not for asynchronous saves: they need the real one.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if not hasattr(filesystem_async, "_results_queue"):
        raise RuntimeError(
            "megatron.core.dist_checkpointing.strategies.filesystem_async has no _results_queue: this release of "
            "megatron-core is not the one shardproof is pinned to (0.19.2)"
        )
    before = filesystem_async._results_queue
    filesystem_async._results_queue = queue.Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = before
