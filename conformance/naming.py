"""The name by which ranks find an adapter: they are other processes, and import it."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from .api import Adapter, load_adapter


def name_of(adapter: Adapter | str) -> str:
    """The name of an adapter for --bridge and for ranks: its own where it is a name, else ``module:NAME`` of the variable that holds it.

    Raises ValueError for a name that loads nothing, and for an object that no importable module holds in a variable.
    """
    if isinstance(adapter, str):
        load_adapter(adapter)
        return adapter
    if hasattr(adapter, "rank_name") and hasattr(adapter, "python"):
        return f"exec:{adapter.python} {adapter.rank_name}"
    first = sys.modules.get(type(adapter).__module__)
    for module in [first, *sys.modules.values()]:
        if isinstance(module, ModuleType) and (variable := _variable(module, adapter)):
            return _importable(module, variable)
    raise ValueError(
        f"adapter {adapter!r} is in no module's variable: ranks import it by name, so write ADAPTER = {type(adapter).__name__}() in a module"
    )


def _variable(module: ModuleType, value: object) -> str | None:
    return next((name for name, held in list(vars(module).items()) if held is value and not name.startswith("@")), None)


def _importable(module: ModuleType, variable: str) -> str:
    file = getattr(module, "__file__", None)
    if module.__name__ == "__main__":
        raise ValueError(
            f"adapter {variable} is in the script that runs: ranks would run the script again; move it to a module of its own"
        )
    if _found(module.__name__) == file:
        return f"{module.__name__}:{variable}"
    if file is None:
        raise ValueError(f"adapter {variable} is in module {module.__name__}, which has no file: ranks cannot import it")
    return f"{Path(file).resolve()}:{variable}"


def _found(module: str) -> str | None:
    """Where another process would find a module."""
    try:
        parent, _, last = module.rpartition(".")
        known = sys.modules.pop(module, None)  # else find_spec answers from the module itself
        try:
            spec = find_spec(module)
        finally:
            if known is not None:
                sys.modules[module] = known
    except (ImportError, ValueError, AttributeError):
        return None
    return spec and spec.origin
