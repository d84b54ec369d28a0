"""Imports the real Transformer Engine's Python from its pure wheel, with the compiled module stubbed.

It gives TE's true names, shapes, dtypes and parallel attributes without the core library, a build or a GPU. Modules build (on
``cpu`` and ``meta``); their forward does not run. For the drift test alone: it changes the process for good, so use a subprocess.
"""

from __future__ import annotations

import enum
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import types
import zipfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from .transformer_engine import VERSION

_OPTIONAL = ("onnx", "onnxscript", "onnxscript.onnx_opset")
"""Packages TE's Python imports at its top and that play no part in building a module."""


def fetch(cache: Path) -> Path:
    """Download and unpack TE's pure wheel under ``cache`` with pip, once; returns the folder to give to `install`.

    Nothing is installed: an installed transformer_engine would count as the real one. Raises RuntimeError if pip fails.
    """
    folder = Path(cache) / f"transformer_engine-{VERSION}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        with zipfile.ZipFile(_download(work)) as wheel:
            wheel.extractall(work / "unpacked")
        (work / "unpacked").rename(folder)  # whole or not at all, also with two test workers
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _download(into: Path) -> Path:
    want = f"transformer_engine=={VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(into), want]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(into.glob("transformer_engine-*-py3-none-any.whl"))
    if done.returncode or not wheels:
        raise RuntimeError(
            f"pip could not download {want}, whose names and shapes the stand-in is compared with. Give pip a network or an "
            f"index that has it, or unpack its pure wheel into the cache yourself. pip said:\n{done.stdout}{done.stderr}"
        )
    return wheels[0]


def install(folder: Path) -> None:
    """Make ``import transformer_engine`` give the Python under ``folder`` (see `fetch`), compiled parts stubbed.

    Call it before ``host.install()``, which then leaves its own stand-in out. Presents the CPU as CUDA first.
    """
    from . import cuda_surface

    cuda_surface.install()
    import torch

    torch.cuda.is_available = lambda: True  # TE refuses to build a module otherwise, on meta too
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # TE's own switch against loading the core library
    sys.path.insert(0, str(folder))
    sys.modules["transformer_engine_torch"] = _extension()
    # find all first: find_spec raises for a package of which a stub is in place
    for name in [name for name in _OPTIONAL if importlib.util.find_spec(name.split(".")[0]) is None]:
        sys.modules[name] = _StubModule(name)
    _import_package()


def _import_package() -> None:
    """Import TE in two steps, so that the loader of the compiled extension can be replaced before it is called."""
    spec = importlib.util.find_spec("transformer_engine")
    package = importlib.util.module_from_spec(spec)
    sys.modules["transformer_engine"] = package
    common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None
    spec.loader.exec_module(package)
    importlib.import_module("transformer_engine.pytorch")


def _extension() -> types.ModuleType:
    """``transformer_engine_torch``; two enums are checked by TE member by member, the rest may be anything."""
    stub = _StubModule("transformer_engine_torch")
    members = "kByte kInt32 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat4E2M1"
    stub.DType = enum.IntEnum("DType", members)
    backends = "NVTE_No_Backend NVTE_F16_arbitrary_seqlen NVTE_FP8"
    stub.NVTE_Fused_Attn_Backend = enum.IntEnum("NVTE_Fused_Attn_Backend", backends)
    return stub


_numbers = itertools.count(1)


class _Anything:
    """Stands for every enum member, class and function of the compiled extension: importable, and nothing more."""

    def __init__(self, name: str) -> None:
        self.__dict__["_name"], self.__dict__["_number"] = name, next(_numbers)

    def __getattr__(self, key: str) -> Any:
        if key.startswith("__") and key != "__members__":
            raise AttributeError(key)
        value = {} if key == "__members__" else _Anything(f"{self._name}.{key}")
        self.__dict__[key] = value
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> _Anything:
        return _Anything(f"{self._name}()")

    def __int__(self) -> int:
        return self._number

    __index__ = __int__

    def __hash__(self) -> int:
        return self._number

    def __mro_entries__(self, bases: tuple) -> tuple:
        return (object,)

    def __or__(self, other: Any) -> type:
        return object

    __ror__ = __or__


class _StubModule(types.ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)  # torch._dynamo asks find_spec for onnx, which raises without one

    def __getattr__(self, key: str) -> Any:
        if key.startswith("__"):
            raise AttributeError(key)
        value = _Anything(key)
        setattr(self, key, value)
        return value
