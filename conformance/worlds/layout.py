"""Parallel sizes of a world, read from any mapping or object that has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from .errors import WorldError


@dataclass(frozen=True)
class Layout:
    """Sizes handed to `parallel_state.initialize_model_parallel`; what is left of the world becomes data parallel.

    `vpp` None: no virtual pipeline. `etp` None: as `tp` (megatron's own default).
    """

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    cp: int = 1
    ep: int = 1
    etp: int | None = None

    @classmethod
    def of(cls, source) -> Layout | None:
        """Read a mapping with the keys tp, pp, vpp, cp, ep, etp, or an object with attributes of these names.

        A missing or None size is 1 (vpp, etp: None). An unknown key of a mapping, or a size that is not a positive
        int, raises WorldError. None stays None.
        """
        if source is None or isinstance(source, cls):
            return source
        names = [f.name for f in fields(cls)]
        if isinstance(source, Mapping):
            unknown = sorted(set(source) - set(names))
            if unknown:
                raise WorldError(f"layout has unknown keys {unknown}; the known ones are {names}")
            found = {n: source.get(n) for n in names}
        else:
            found = {n: getattr(source, n, None) for n in names}
            if all(v is None for v in found.values()):
                raise WorldError(f"layout {source!r} is neither a mapping nor has it any attribute of {names}")
        for name, value in found.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise WorldError(f"layout size {name}={value!r} is not a positive integer")
        return cls(**{n: v for n, v in found.items() if v is not None})

    @property
    def ranks(self) -> int:
        """The smallest world that holds this layout."""
        return math.lcm(self.tp * self.pp * self.cp, (self.etp or self.tp) * self.ep * self.pp)

    def check(self, world_size: int) -> None:
        """Raise WorldError unless a world of `world_size` ranks can hold this layout."""
        if world_size % self.ranks:
            raise WorldError(
                f"{self} needs a multiple of {self.ranks} ranks and the world has {world_size}; "
                f"use a pool of {self.ranks} ranks (Pools picks it when world_size is None)"
            )
