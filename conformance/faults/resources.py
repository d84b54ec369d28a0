"""Faults of the class `resources`: right results, at a price that only large models show."""

from pathlib import Path

from .base import Fault
from .levers import streamed


def _reads_all(right, folder, *args, **kwargs):
    """Every rank reads the whole checkpoint before it takes its pieces."""
    from ..checks.base import disk

    disk(Path(folder))
    return right(folder, *args, **kwargs)


def _held(stream, folder):
    """All tensors are collected before the first is given."""
    return iter([(name, tensor.clone()) for name, tensor in stream])


def _object_each(stream, folder):
    """Ranks agree on every tensor's name by sending objects."""
    import torch.distributed as dist

    for name, tensor in stream:
        names = [None] * dist.get_world_size()
        dist.all_gather_object(names, name)
        yield name, tensor


def _barriers(stream, folder):
    """Ranks wait for each other several times a tensor."""
    import torch.distributed as dist

    for name, tensor in stream:
        for _ in range(5):
            dist.barrier()
        yield name, tensor


def _scanned(stream, folder):
    """After every tensor all that came before are looked through."""
    done = []
    for name, tensor in stream:
        done.append(name)
        if not [n for n in done if n.startswith("")]:
            return
        yield name, tensor


FAULTS = [
    Fault("every_rank_reads_all", "resources", "every rank reads the whole checkpoint", ("resources.reads",), {"build": _reads_all},
          plans=("tp2,pp2,split2-3", "tp2,sp,ep2,etp1")),
    Fault("export_collected", "resources", "an export is collected in memory before it streams", ("resources.memory",), streamed(_held),
          bugs=("U187",)),
    Fault("objects_for_every_tensor", "resources", "ranks send each other an object for every tensor", ("resources.collectives",),
          streamed(_object_each), plans=("pp2,split3-2",), bugs=("U182",)),
    Fault("barriers_for_every_tensor", "resources", "ranks wait for each other five times a tensor", ("resources.collectives",),
          streamed(_barriers), plans=("pp2,split3-2",), bugs=("U182",)),
    Fault("all_names_scanned", "resources", "all names are looked through again for every tensor", ("resources.calls",), streamed(_scanned),
          bugs=("U185",)),
]  # fmt: skip
