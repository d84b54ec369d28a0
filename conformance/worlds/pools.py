"""Pools by world size: the one that fits is found, started or replaced."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from .errors import WorldError
from .launcher import shared_server
from .layout import Layout
from .pool import PRELOAD, Pool


class Pools:
    """Live pools by world size, at most `limit` of them; the least recently used one goes first.

    `host`, `preload`, `start_timeout`, `backend`, `python` as for Pool. One Pools per process: with pytest-xdist each worker
    process has its own, and its own fork server (see `suggested_workers`).
    The fork server starts to import at once, so that the first `run` waits less.

    Attribute `start_seconds`: {world size: [seconds of each start so far]}; its lists grow when a pool is replaced.
    """

    def __init__(
        self,
        *,
        host: str | None,
        limit: int = 2,
        preload: Sequence[str] = PRELOAD,
        start_timeout: float = 120.0,
        backend: str = "gloo",
        python: str | None = None,
    ):
        if limit < 1:
            raise WorldError(f"limit={limit} leaves no pool alive; give at least 1")
        self._options = {
            "host": host,
            "preload": tuple(preload),
            "start_timeout": start_timeout,
            "backend": backend,
            "python": python,
        }
        self._pools: OrderedDict[int, Pool] = OrderedDict()
        self.limit, self.start_seconds = limit, {}
        shared_server(host, tuple(preload), python, gpu=backend == "nccl")

    def get(self, world_size: int) -> Pool:
        """The live pool of this size; starts or replaces it where needed, and closes the least recently used one."""
        pool = self._pools.pop(world_size, None)
        if pool is not None and not pool.alive:
            pool.close()
            pool = None
        if pool is None:
            while len(self._pools) >= self.limit:
                self._pools.popitem(last=False)[1].close()
            pool = Pool(world_size, **self._options)
            self.start_seconds.setdefault(world_size, []).append(pool.start_seconds)
        self._pools[world_size] = pool
        return pool

    def run(
        self,
        world_size: int | None,
        task: str,
        *,
        layout=None,
        timeout: float = 120.0,
        args: tuple = (),
        kwargs: Mapping | None = None,
        seed: int = 1234,
    ) -> list:
        """`Pool.run` on the pool of `world_size` ranks; None: as many as the layout needs.

        After a RankError or RankTimeout the next run gets a new pool.
        """
        layout = Layout.of(layout)
        if world_size is None:
            world_size = layout.ranks if layout else 1
        if layout is not None:
            layout.check(world_size)  # before a pool is started for it
        return self.get(world_size).run(task, layout=layout, timeout=timeout, args=args, kwargs=kwargs, seed=seed)

    @property
    def sizes(self) -> tuple[int, ...]:
        """World sizes of the pools alive, least recently used first."""
        return tuple(size for size, pool in self._pools.items() if pool.alive)

    def close(self) -> None:
        """End all pools; the fork server stays until `shutdown` or the end of the process."""
        while self._pools:
            self._pools.popitem()[1].close()

    def __enter__(self) -> Pools:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def suggested_workers(world_size: int, *, cpus: int | None = None, memory_bytes: int | None = None) -> int:
    """How many processes (pytest-xdist's -n) may each hold a Pools with `world_size` ranks alive.

    One a core, since ranks of one world mostly wait for each other, as far as memory goes: 1.5 GiB for a process with its
    two servers (measured 0.7 GB each), 0.125 GiB for a rank. `cpus` and `memory_bytes` default to what this process may use.
    """
    cpus = cpus or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    memory_bytes = memory_bytes or _available_memory()
    return max(1, min(cpus, memory_bytes // (3 * 2**29 + world_size * 2**27)))


def _available_memory() -> int:
    import psutil

    return psutil.virtual_memory().available
