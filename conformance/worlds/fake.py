"""The fake world: any rank of a layout of any size, in one process, for names and shapes on meta."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .errors import WorldError
from .layout import Layout
from .pool import PRELOAD, check_name
from .solo import OneProcess, Solo


class FakeWorld(OneProcess):
    """A persistent process that stands in for one rank after the other of worlds that do not exist.

    Collectives there return at once and exchange nothing, so values mean nothing: build modules under
    `torch.device("meta")` and look at names, shapes and sharding. `host`, `preload`, `start_timeout`, `python` as for Pool.
    """

    def __init__(
        self, *, host: str | None, preload: Sequence[str] = PRELOAD, start_timeout: float = 120.0, python: str | None = None
    ):
        check_name("host", host, optional=True)
        self._solo = Solo("fake", host=host, preload=preload, start_timeout=start_timeout, python=python)

    def run(
        self,
        task: str,
        layout,
        world_size: int,
        rank: int,
        *,
        args: tuple = (),
        kwargs: Mapping | None = None,
        timeout: float = 120.0,
        seed: int = 1234,
    ):
        """Run "module:function" as rank `rank` of `world_size`, with parallel_state at `layout`; its result.

        `layout`: see Layout.of. Raises WorldError for a layout or rank that does not fit, RankError when the task raises or
        the process ends (its `rank` is 0, the only process), RankTimeout after `timeout` seconds.
        """
        check_name("task", task)
        layout = Layout.of(layout)
        if layout is not None:
            layout.check(world_size)
        if not 0 <= rank < world_size:
            raise WorldError(f"rank {rank} is not in a world of {world_size}; ranks count from 0")
        request = {
            "task": task,
            "layout": layout,
            "args": tuple(args),
            "kwargs": dict(kwargs or {}),
            "seed": seed,
            "world_size": world_size,
            "rank": rank,
        }
        return self._solo.exchange(request, timeout)
