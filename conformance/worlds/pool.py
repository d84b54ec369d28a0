"""A persistent pool of ranks: processes stay, layouts change in milliseconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .errors import WorldError
from .launcher import shared_server
from .layout import Layout
from .workers import Workers

# What all workers share, imported once by the fork server. transformers loads its models lazily: top level only.
# torch._dynamo comes in with the first forward through a disabled function, and takes seconds.
PRELOAD = (
    "torch",
    "torch.distributed",
    "torch._dynamo",
    "megatron.core",
    "megatron.core.parallel_state",
    "megatron.core.tensor_parallel.random",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.dist_checkpointing",
    "transformers",
)


class Pool:
    """`world_size` persistent ranks forked from a server with the heavy imports done.

    `host`: "module:function", called without arguments in the server and in each rank before megatron.core is imported
    (what makes megatron run without a GPU); None on a machine with GPUs. `preload`: modules that the server imports.
    `start_timeout`: seconds for the start, the server's own included (5-10 s when it is not up). `backend`: of
    torch.distributed. `python`: the ranks' interpreter, with its own packages (Python 3.10 or later, torch, megatron-core, numpy);
    None for this one.

    Attributes: `world_size`, `start_seconds` (wall time of the start), `host_record` (what the host said of itself in
    rank 0, or None), `seconds` (of the last run, per rank: set-up and task).
    """

    def __init__(
        self,
        world_size: int,
        *,
        host: str | None,
        preload: Sequence[str] = PRELOAD,
        start_timeout: float = 120.0,
        backend: str = "gloo",
        python: str | None = None,
    ):
        if not isinstance(world_size, int) or world_size < 1:
            raise WorldError(f"world_size={world_size!r} is not a positive integer")
        check_name("host", host, optional=True)
        spec = {"mode": "ranks", "host": host, "backend": backend}
        self.world_size = world_size
        server = shared_server(host, tuple(preload), python, gpu=backend == "nccl")
        self._workers = Workers(server, world_size, spec, start_timeout=start_timeout)
        self.start_seconds = self._workers.start_seconds
        self.host_record = self._workers.records[0]

    def run(
        self, task: str, *, layout=None, timeout: float = 120.0, args: tuple = (), kwargs: Mapping | None = None, seed: int = 1234
    ) -> list:
        """Run "module:function" in every rank; its results in rank order.

        `layout`: see Layout.of; None leaves no parallel_state at all. `timeout`: seconds, for layout and task together.
        `args`, `kwargs`: the same for all ranks; picklable. `seed`: all random states are reset to it, every time.

        Results are pickled; tensors come back by value, on the CPU (see wire). Raises RankError when a rank raises or
        ends, RankTimeout when one does not finish; either ends the pool. WorldError for a layout that does not fit.
        """
        check_name("task", task)
        layout = Layout.of(layout)
        if layout is not None:
            layout.check(self.world_size)
        request = {"task": task, "layout": layout, "args": tuple(args), "kwargs": dict(kwargs or {}), "seed": seed}
        return self._workers.exchange(request, timeout)

    @property
    def alive(self) -> bool:
        """Whether all ranks still run; asks the processes, not a flag."""
        return self._workers.healthy()

    @property
    def pids(self) -> list[int | None]:
        """Process ids in rank order."""
        return list(self._workers.pids)

    @property
    def seconds(self) -> list[tuple[float, float]]:
        """Of the last run, per rank: seconds of set-up (layout, seeds) and seconds of the task."""
        return self._workers.seconds

    def close(self) -> None:
        """End the ranks; the fork server stays for the next pool (see `shutdown`)."""
        self._workers.close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def check_name(what: str, name: str | None, *, optional: bool = False) -> None:
    """Raise WorldError unless `name` reads "module:function"."""
    if name is None and optional:
        return
    module, _, function = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not module or not function:
        raise WorldError(f"{what}={name!r} is not of the form 'module:function'")
