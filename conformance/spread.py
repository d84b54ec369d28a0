"""Under pytest-xdist: a toy's cases stay in one worker, where its results are; the workers share the fork servers of the process that
started them, which import torch, transformers and megatron-core once and not once a worker.

``--dist loadgroup`` would do with marks, but pytest-xdist 3.8 writes a group into an attribute that pytest 9.2 does not read any more, and
every case then goes anywhere. The id says enough.
"""

from __future__ import annotations

import gc
import re

import pytest

_CASE = re.compile(r"\[(?P<family>[^/\[\]]+)/(?P<toy>[^/\]]+)/[^/\]]+/[^/\]]+/[^/\]]+/(?P<group>\w+)\.\w+\]$")
_APART = ("bits", "config", "explore", "flops", "io", "pure", "quant", "resources", "scale")  # laws that measure for themselves


def group_of(test_id: str) -> str | None:
    """What shares results: one toy's cases, those of laws that measure for themselves apart. None for another test."""
    case = _CASE.search(test_id)
    return case and f"{case['family']}/{case['toy']}" + ("/apart" if case["group"] in _APART else "")


def scheduler(config, log):
    """pytest-xdist's loadgroup scheduler, which knows our groups."""
    from xdist.scheduler import LoadGroupScheduling

    class ByToy(LoadGroupScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid) or super()._split_scope(nodeid)

    return ByToy(config, log)


class Lender:
    """Hooks of the process that deals out: starts the servers of --bridge when the first worker starts, and tells every worker of them."""

    def __init__(self, config):
        self.bridge, self.lent = config.getoption("bridge"), None

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node):
        """Called for every worker before it starts."""
        if self.lent is None:
            self.lent = servers(self.bridge)
        node.workerinput["shardproof_servers"] = self.lent


class Leaver:
    """Hooks of a worker: when its session ends it has a million objects, and pytest would look at each five times."""

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self):
        """Leave them out."""
        gc.freeze()


def servers(bridge: str) -> list:
    """Started servers of a bridge's worlds; none where it cannot be loaded (the workers say why) or has an interpreter of its own."""
    from .api import load_adapter
    from .worlds import PRELOAD, PRELOAD_CLEAN
    from .worlds.launcher import lend

    if "exec:" in bridge:
        return []
    try:
        adapter = load_adapter(bridge)
    except Exception:
        return []
    return [lend(None, PRELOAD_CLEAN), lend(adapter.host, (*PRELOAD, *getattr(adapter, "preload", ())))]


def join(config) -> None:
    """In a worker: use the servers of the process that started it. In that process: get ready to lend, if cases are dealt out."""
    if hasattr(config, "workerinput"):
        from .worlds.launcher import borrow

        config.pluginmanager.register(Leaver(), "shardproof-leaver")
        borrow([(tuple(map(_frozen, key)), door) for key, door in config.workerinput.get("shardproof_servers", [])])
    elif config.getoption("dist", "no") == "loadgroup" and any("conformance" in argument for argument in config.args):
        config.pluginmanager.register(Lender(config), "shardproof-lender")


def _frozen(value):
    return tuple(value) if isinstance(value, list) else value
