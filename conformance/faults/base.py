"""What a planted fault is: a table of levers, each in the place of one member of a right adapter.

A lever is called as ``lever(right, *arguments)`` where `right` is the right adapter's own method. It sees arguments and results only: no
lever knows whose bridge it is pulled on. Names of Megatron parameters are megatron-core's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from ..api import Adapter

Levers = Mapping[str, Callable]
HOME = frozenset({"family_of", "possible", "snapshot", "rewrite_config", "flops"})  # members called in the test process


@dataclass(frozen=True)
class Model:
    """What decides whether a fault can show on a toy: its config.json and, read when asked for, the names of its Hugging Face tensors."""

    config: Mapping[str, Any]
    read: Callable[[], frozenset[str]]

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of the toy's tensors."""
        return self.read()

    def has(self, part: str) -> bool:
        """Whether some tensor's name contains `part`."""
        return any(part in name for name in self.names)

    def field(self, key: str) -> Any:
        """A config field, whichever of transformers' spellings holds it; None where it is absent."""
        rope = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        return self.config.get(key, rope.get(key))


def anywhere(model: Model) -> bool:
    """Every family."""
    return True


def latent(model: Model) -> bool:
    """Attention through latents: no query, key or value projection of its own, a rotary part of a head."""
    return bool(model.config.get("kv_lora_rank"))


def one_rope(model: Model) -> bool:
    """Rotary frequencies that all layers share."""
    own = ("rope_local_base_freq", "swa_rope_theta")
    return not any(model.config.get(key) for key in own) and not isinstance(model.config.get("rope_theta"), list)


def alike(model: Model) -> bool:
    """Attention has the same shapes in every layer, and values are as wide as keys where it has no latents."""
    return same_shapes(model.config)


def same_shapes(config: Mapping[str, Any]) -> bool:
    """Whether sliding layers have the shapes of the others."""
    return not (config.get("swa_num_key_value_heads") or config.get("attention_other_setting"))


def repeated(model: Model) -> bool:
    """Layers have the blocks of their neighbours: none were pruned one by one."""
    return not model.config.get("block_configs")


def fused(model: Model) -> bool:
    """Attention whose query, key and value projections are one in Megatron, with heads of one width."""
    return not latent(model) and alike(model)


@dataclass(frozen=True)
class Fault:
    """One way to be wrong.

    klass: the class of shipped bugs it belongs to. story: what the bridge does wrong, a sentence. owners: ids of the checks that must kill
    it. where: the toys on which it is a fault at all. geometries, plans: where it is looked for, in this order; the first that a family can
    carry is taken. bugs: entries of the catalogue of shipped bugs that it stands for. equivalent: for a mutant that no forward pass can
    tell from the right bridge, the proof in words.
    """

    name: str
    klass: str
    story: str
    owners: tuple[str, ...]
    levers: Levers
    where: Callable[[Model], bool] = anywhere
    geometries: tuple[str, ...] = ("default",)
    plans: tuple[str, ...] = ("tp1",)
    bugs: tuple[str, ...] = ()
    equivalent: str = ""

    @property
    def at_home(self) -> bool:
        """Whether the fault is in the test process alone: what ranks measure is then the right bridge's."""
        return set(self.levers) <= HOME


@dataclass(frozen=True)
class Planted:
    """An adapter with one fault; what it has no lever for is the right adapter's own."""

    fault: Fault
    right: Adapter
    name: str = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "name", f"{self.right.name} with the planted fault {self.fault.name}")

    def __getattr__(self, member: str):
        right = getattr(object.__getattribute__(self, "right"), member)  # an AttributeError where the right one offers less
        if member == "rank_name":  # of an adapter in another interpreter: the fault goes there with it
            return f"{self.fault.name}@{right}"
        lever = self.fault.levers.get(member)
        return partial(lever, right) if lever else right
