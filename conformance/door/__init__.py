"""The out-of-process door: bridges whose pins cannot live beside ours run in their own environment's interpreter.

``exec:PYTHON MODULE:NAME`` names such an adapter (`FAULT@exec:...` the same with a planted fault). The suite, the toys, transformers'
references and the checks stay in this interpreter; the adapter's rank methods run in ranks of the other one, its test-process methods in
one helper process there. Nothing is installed there. The other side needs Python 3.10 or later, torch, numpy, safetensors and
megatron-core, in its own versions.
"""

from __future__ import annotations

import re
from functools import cache

from .errors import DoorError, RemoteError
from .remote import RemoteAdapter

__all__ = ["DoorError", "RemoteAdapter", "RemoteError", "is_exec", "open_door"]

_EXEC = re.compile(r"(?:(?P<fault>[^@]*)@)?exec:(?P<python>.+?)\s+(?P<inner>\S+)\s*")


def is_exec(name: str) -> bool:
    """Whether an adapter's name asks for this door."""
    return re.match(r"(?:[^@]*@)?exec:", name) is not None


def open_door(name: str) -> RemoteAdapter:
    """The adapter ``exec:PYTHON MODULE:NAME`` (one helper process a name). Raises ValueError for any other form, DoorError when the
    adapter cannot be loaded there."""
    found = _EXEC.fullmatch(name)
    if found is None:
        raise ValueError(f"no adapter {name!r}: write exec:ENV/bin/python MODULE:NAME, with one blank between them")
    inner = f"{found['fault']}@{found['inner']}" if found["fault"] else found["inner"]
    return _opened(found["python"], inner)


@cache
def _opened(python: str, inner: str) -> RemoteAdapter:
    return RemoteAdapter(python, inner)
