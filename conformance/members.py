"""Whether an adapter's members have the shape of the protocol. Also run in another interpreter: light imports only."""

from __future__ import annotations

import inspect

from .api import REQUIRED, Adapter

PLAIN_MEMBERS = ("preload", "snapshots")  # optional, and no methods


def misfits(adapter) -> list[str]:
    """Sentences about members that are missing, of the wrong kind, or do not take what the suite passes."""
    found = [f"{member} is missing" for member in REQUIRED if not hasattr(adapter, member)]
    if not isinstance(getattr(adapter, "name", ""), str) or not getattr(adapter, "name", "?"):
        found.append("name must be a text that is not empty")
    host = getattr(adapter, "host", None)
    if host is not None and (not isinstance(host, str) or host.count(":") != 1 or not all(host.split(":"))):
        found.append(f"host is {host!r}; it must read module:function, or be None")
    for name, promised in vars(Adapter).items():
        if inspect.isfunction(promised) and not name.startswith("_") and hasattr(adapter, name):
            found += _misfit(name, getattr(adapter, name), promised)
    return found


def _misfit(name: str, member, promised) -> list[str]:
    if not callable(member):
        return [f"{name} is {type(member).__name__}, not a method"]
    wanted = list(inspect.signature(promised).parameters.values())[1:]  # less self
    args = [p.name for p in wanted if p.kind is not p.KEYWORD_ONLY]
    kwargs = {p.name: None for p in wanted if p.kind is p.KEYWORD_ONLY}
    try:
        inspect.signature(member).bind(*args, **kwargs)
    except TypeError as error:
        shown = ", ".join([*args, *(f"{k}=..." for k in kwargs)])
        return [f"{name} cannot be called as {name}({shown}): {error}"]
    except ValueError:  # built in: nothing is known of it
        return []
    return []
