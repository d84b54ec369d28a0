"""The CPU presented as CUDA device 0, at the torch surface. Nothing in megatron is touched.

Megatron names its device in several ways, and each has one answer here:

* ``device=torch.cuda.current_device()``: most sites. The function answers the CPU device.
* ``torch.cuda.default_generators[i]``, lazy initialisation: with the CPU's generator megatron's RNG tracker works unmodified.
* literal ``"cuda"``, ``.cuda()``, ``pin_memory=True``, ``tensor.type() == "torch.cuda.FloatTensor"``: several dozen sites;
  a `TorchFunctionMode` turns them (about 14 us per torch call).
* streams, events, synchronisation, memory statistics: inert.
* ``torch.compile``: identity, as ``jit_fuser`` would otherwise start a C++ compiler.

``torch.cuda.is_available()`` stays False, so that transformers and everyone else go on seeing a machine without a GPU.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.cuda.random
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")

_MODE: CudaIsCpu | None = None


def installed() -> bool:
    """Whether this process presents its CPU as CUDA device 0."""
    return _MODE is not None


def install() -> None:
    """Present the CPU as CUDA device 0, in this process for good. Later calls change nothing."""
    global _MODE
    if _MODE is not None:
        return
    # megatron demands it for sequence parallel; it has no effect without CUDA
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # ranks are forked: the tokenizers' thread pool would warn in each of them
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _answer_as_device_zero()
    _make_streams_inert()
    torch.compile = _compile_nothing
    _drop_one_warning()
    _MODE = CudaIsCpu()
    _keep_mode_in_backward(_MODE)
    reenter()


def reenter() -> None:
    """Switch the redirection on in the calling thread, if the layer is installed and it is not on already."""
    if _MODE is not None and not _MODE.is_on():
        _MODE.__enter__()  # for the life of the thread


class CudaIsCpu(TorchFunctionMode):
    """Turns every torch call that names a CUDA device into one on the CPU."""

    def is_on(self) -> bool:
        """Whether the calling thread's torch calls pass through this mode now."""
        return self in torch.overrides._get_current_function_mode_stack()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = _on_cpu(kwargs) if kwargs else {}
        answer = _ANSWERS.get(func)
        return func(*args, **kwargs) if answer is None else answer(*args, **kwargs)


def _itself(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor


def _moved(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor.to(CPU, *args[1:], **kwargs) if args and _is_cuda(args[0]) else tensor.to(*args, **kwargs)


def _typed(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    named = tensor.type(*args, **kwargs)  # the optimizers sort parameters by this string
    return named.replace("torch.", "torch.cuda.", 1) if not args and isinstance(named, str) else named


_ANSWERS = {
    torch.Tensor.cuda: _itself,
    torch.Tensor.pin_memory: _itself,
    torch.Tensor.record_stream: lambda *args, **kwargs: None,
    torch.Tensor.to: _moved,
    torch.Tensor.type: _typed,
}


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)  # a bare index means CUDA


def _on_cpu(kwargs: dict) -> dict:
    if _is_cuda(kwargs.get("device")):
        kwargs = {**kwargs, "device": CPU}
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    return kwargs


def _keep_mode_in_backward(mode: CudaIsCpu) -> None:
    """Switch the mode on again while the autograd engine runs.

    A mode is off while it handles a call, and `Tensor.backward` and `torch.autograd.grad` are such calls: megatron's custom
    backwards and recomputed forwards would meet a literal "cuda" unguarded. Both reach the engine through this one name.
    """
    engine = getattr(torch.autograd, "_engine_run_backward", None)
    if engine is None:
        raise RuntimeError(
            f"torch {torch.__version__} has no torch.autograd._engine_run_backward, which the host layer wraps: "
            "use a torch release that has it (2.13 does)"
        )

    def run(*args: Any, **kwargs: Any) -> Any:
        with contextlib.nullcontext() if mode.is_on() else mode:
            return engine(*args, **kwargs)

    torch.autograd._engine_run_backward = run


def _constant(value: Any = None) -> Callable:
    """A fresh function per name: torch._dynamo refuses one object under two names."""
    return lambda *args, **kwargs: value


class _Generators:
    """``torch.cuda.default_generators``: the CPU's generator under every index."""

    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


def _answer_as_device_zero() -> None:
    for name, value in (("current_device", CPU), ("is_initialized", True), ("device_count", 1)):
        answer = _constant(value)
        setattr(torch.cuda, name, answer)
        setattr(torch.cuda.random, name, answer)  # it imported them by name
    torch.cuda.is_available = _constant(False)  # with PYTORCH_NVML_BASED_CUDA_CHECK torch would ask the count above
    torch.cuda.default_generators = _Generators()
    torch.cuda._lazy_init = _constant()


class _Inert:
    """Stands in for a stream and an event: on a CPU everything has happened when the call returns."""

    cuda_stream = 0
    device = CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("__"):
            raise AttributeError(name)
        return _constant()

    def record_event(self, event: Any = None) -> Any:  # megatron waits on what this returns
        return event or torch.cuda.Event()

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0

    def __enter__(self) -> _Inert:
        return self

    def __exit__(self, *exc: Any) -> bool:
        return False


def _make_streams_inert() -> None:
    cuda = torch.cuda
    cuda.Stream = type("Stream", (_Inert,), {})
    cuda.Event = type("Event", (_Inert,), {})
    stream = cuda.Stream()
    answers = {
        "current_stream": stream, "default_stream": stream, "set_device": None, "synchronize": None, "empty_cache": None,
        "is_current_stream_capturing": False, "get_device_capability": (9, 0), "get_device_name": "cpu",
        "memory_allocated": 0, "max_memory_allocated": 0, "memory_reserved": 0,
    }  # fmt: skip
    for name, value in answers.items():
        setattr(cuda, name, _constant(value))
    cuda.memory_stats = lambda *args, **kwargs: {}
    cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, _constant())


def _compile_nothing(model: Callable | None = None, **kwargs: Any) -> Callable:
    return model if model is not None else lambda function: function


def _drop_one_warning() -> None:
    """Megatron warns when the CPU generator moves inside its GPU context: here they are one generator."""
    log = logging.getLogger("megatron.core.tensor_parallel.random")
    log.addFilter(lambda entry: "CPU RNG state changed" not in entry.getMessage())
