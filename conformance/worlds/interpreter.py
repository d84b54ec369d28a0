"""The command that runs a function of ours in some interpreter: this one, or one whose packages are its own."""

from __future__ import annotations

import json
import os
import shutil
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from .errors import WorldError

_HERE = (
    "import importlib, json, sys; q = json.loads(sys.argv[1]); sys.path[:] = q['path']; m, _, f = q['call'].partition(':'); "
    "getattr(importlib.import_module(m), f)(*q['args'])"
)
# Whatever of ours an adapter, or the host that it names, may want there.
_ROOMS = ("bridges", "conformance", "fixtures", "toy_models")


def command(python: str | None, call: str, *args) -> list[str]:
    """The command line that calls "module:function" with JSON-able arguments.

    `python`: a path; None is this interpreter, with this process's sys.path. Another interpreter keeps its own sys.path, gets the
    working folder in front of it, and finds our packages in the folders where they lie: nothing is installed there.
    """
    if python is None:
        return [sys.executable, "-c", _HERE, json.dumps({"path": sys.path, "call": call, "args": args})]
    request = {"packages": packages(), "call": call, "args": args}
    return [python, str(Path(__file__).with_name("bootstrap.py")), json.dumps(request)]


def environment(python: str | None) -> dict[str, str]:
    """The environment variables for `command`: this process's, less what would make another interpreter look for our libraries."""
    mine = dict(os.environ)
    if python is not None:
        for name in ("PYTHONHOME", "__PYVENV_LAUNCHER__"):
            mine.pop(name, None)
    return mine


def interpreter(name: str) -> str:
    """The absolute path of an interpreter, links kept: a virtual environment is known by its link. Raises WorldError if there is none."""
    found = shutil.which(os.path.expanduser(name))
    if found is None:
        raise WorldError(f"no interpreter {name!r}: give the path of an environment's python, like ENV/bin/python")
    return os.path.abspath(found)


@cache
def packages() -> dict[str, str]:
    """Our packages and the folders where they are installed."""
    specs = {f"{__name__.split('.')[0]}.{room}": None for room in _ROOMS}
    for name in specs:
        spec = find_spec(name)
        specs[name] = spec and spec.submodule_search_locations and list(spec.submodule_search_locations)[0]
    return {name: str(folder) for name, folder in specs.items() if folder}
