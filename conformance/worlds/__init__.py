"""Worlds to run tasks in: persistent rank pools, a clean process for references, a fake world for any size.

A task is "module:function"; workers import it. Nothing here knows which bridge or host runs: the host that makes megatron
run on a CPU comes as a dotted string.
"""

from .clean import PRELOAD_CLEAN, Clean
from .devices import gpus
from .errors import RankError, RankTimeout, WorldError
from .fake import FakeWorld
from .launcher import shutdown
from .layout import Layout
from .pool import PRELOAD, Pool
from .pools import Pools, suggested_workers

__all__ = [
    "PRELOAD",
    "PRELOAD_CLEAN",
    "Clean",
    "FakeWorld",
    "Layout",
    "Pool",
    "Pools",
    "RankError",
    "RankTimeout",
    "WorldError",
    "gpus",
    "shutdown",
    "suggested_workers",
]
