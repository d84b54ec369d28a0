"""The process in the other interpreter that answers for an adapter's test-process methods. Imports nothing heavy itself.

Protocol, one JSON object a line: the first line it writes says what the adapter is; then, for each ``{"call": member, "args": [...],
"kwargs": {...}}``, one ``{"result": ...}`` or ``{"error": [type, message, traceback]}``. stdout and stderr are the adapter's own.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import traceback
from collections.abc import Iterator

from ..api import REQUIRED, Adapter
from ..members import PLAIN_MEMBERS, misfits

# What a report should say about the other side.
_PACKAGES = ("torch", "megatron-core", "transformers", "safetensors", "numpy")
_PLAIN = (str, int, float, bool, type(None), list, tuple, dict)


def main(requests: int, answers: int, name: str, rank_members: list[str]) -> None:
    """Serve until the parent closes the pipe. `requests`, `answers`: file descriptors; `rank_members`: what is not called here."""
    with os.fdopen(requests) as incoming, os.fdopen(answers, "w") as outgoing:

        def answer(make) -> None:
            try:
                line = json.dumps({"result": make()}, default=_listed)
            except Exception as error:
                line = json.dumps({"error": [type(error).__name__, str(error), traceback.format_exc()]})
            outgoing.write(line + "\n")
            outgoing.flush()

        adapter = None

        def describe() -> dict:
            nonlocal adapter
            from ..api import load_adapter

            adapter = load_adapter(name)
            return description(adapter, rank_members)

        answer(describe)
        for line in incoming:
            request = json.loads(line)
            answer(lambda request=request: getattr(adapter, request["call"])(*request["args"], **request["kwargs"]))


def description(adapter, rank_members: list[str]) -> dict:
    """What the parent must know: plain attributes by value, the names of methods, versions."""
    values, methods = {}, []
    known = {*dir(adapter), *vars(Adapter), *REQUIRED, *PLAIN_MEMBERS}  # one that hands its members on lists none of them
    for member in sorted(name for name in known if not name.startswith("_")):
        value = getattr(adapter, member, adapter)
        if value is adapter:
            continue
        if callable(value):
            methods.append(member)
        elif isinstance(value, _PLAIN) and _plain(value):
            values[member] = value
    return {
        "values": values,
        "methods": methods,
        "rank": [m for m in methods if m in rank_members],
        "misfits": misfits(adapter),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of this interpreter and of the packages that matter; only those that are there."""
    found = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _listed(value):
    """What JSON has no word for and a list says as well."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Iterator):
        return list(value)
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _plain(value) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
