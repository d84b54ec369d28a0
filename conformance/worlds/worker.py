"""What runs in a forked worker: take a request, put the process in a known state, run the task, answer.

Modes: "ranks" (a rank of a gloo or NCCL world), "fake" (any rank of a world that does not exist), "clean" (no process
group, no megatron, no stand-in). A request is a dict: task "module:function", args, kwargs, layout, seed and, for
"fake", world_size and rank. An answer is a byte and a pickle: RESULT (result, seconds of set-up, seconds of task) or
ERROR (monotonic time, type name, message, traceback).
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import itertools
import operator
import os
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection

from . import wire
from .server import call_host

RESULT, ERROR = b"R", b"E"
TIDY_EVERY = 8  # tasks: a look at all objects takes as long as a small task


def main(conn: Connection, spec: dict) -> None:
    """Serve requests on `conn` until the parent sends an empty message or is gone."""
    stand_in(spec)
    _capture(spec)
    try:
        setup = _MODES[spec["mode"]](spec)
        answer = _result(setup.record, 0.0, 0.0)
    except BaseException as error:
        answer = _error(error)
    with contextlib.suppress(EOFError, OSError):
        for served in itertools.count():
            conn.send_bytes(answer)
            answer = None  # a result may be large: it must not outlive its sending
            data = conn.recv_bytes()
            os.ftruncate(1, 0)  # the log holds the output of one task
            if not data:
                return
            try:
                if served % TIDY_EVERY == TIDY_EVERY - 1:
                    _let_graphs_go()
                    gc.collect()
                answer = _serve(setup, wire.loads(data))
            except BaseException as error:
                answer = _error(error)
            del data


def _serve(setup, request: dict) -> bytes:
    start = time.perf_counter()
    _reset_torch(request["seed"])
    setup.before(request)
    ready = time.perf_counter()
    module, _, function = request["task"].partition(":")
    if not function:
        raise ValueError(f"task {request['task']!r} is not of the form 'module:function'")
    task = operator.attrgetter(function)(importlib.import_module(module))
    result = task(*request["args"], **request["kwargs"])
    setup.after()
    return _result(result, ready - start, time.perf_counter() - ready)


def _let_graphs_go() -> None:
    """Cut what earlier tasks left of autograd graphs, so that its models can be collected.

    A token dispatcher keeps activations; their graph reaches the parameters' gradient hooks, and these the model that has the dispatcher: a
    ring through C++, which Python's collector cannot see. A few hundred models later a collection takes longer than a task.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return
    for held in gc.get_objects():
        if type(held) not in (dict, list):
            continue
        pairs = held.items() if type(held) is dict else enumerate(held)
        for key in [key for key, value in pairs if isinstance(value, torch.Tensor) and value.grad_fn is not None]:
            held[key] = held[key].detach()


def _result(value, setup_s: float, task_s: float) -> bytes:
    return wire.dumps((value, setup_s, task_s), RESULT)


def _error(error: BaseException) -> bytes:
    when, trace = time.monotonic(), error.__traceback__
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next  # the frames of this file tell the reader nothing
    text = "".join(traceback.format_exception(type(error), error, trace))
    return wire.dumps((when, type(error).__name__, str(error), text), ERROR)


def stand_in(spec: dict) -> None:
    """Into the folder and the module path of the process that asked; stdout and stderr into the log."""
    os.chdir(spec["cwd"])
    if spec["sys_path"] is not None:  # another interpreter keeps its own
        sys.path[:] = spec["sys_path"]
    log = os.open(spec["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def _capture(spec: dict) -> None:
    """Output line by line; Python stacks on SIGUSR1 into the worker's stack file, fatal ones into the log."""
    sys.stdout.reconfigure(line_buffering=True)  # what a rank printed must survive its death
    faulthandler.enable()
    stack = os.open(spec["stack"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)


def _reset_torch(seed: int) -> None:
    """Every task starts from the same torch: seeds, threads, default dtype and device, gradients on."""
    import random

    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_grad_enabled(True)


class _Ranks:
    """A rank of a real world, for the life of the process."""

    def __init__(self, spec: dict):
        if sys.platform == "linux":  # keep gloo on this machine, whatever the host name resolves to
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        self.record = _record(call_host(spec["host"]))
        import torch.distributed as dist

        from .groups import cache_process_groups

        cache_process_groups()
        if "nccl" in spec["backend"]:
            import torch

            torch.cuda.set_device(spec["rank"])
        store = dist.FileStore(spec["store"], spec["world_size"])
        dist.init_process_group(spec["backend"], store=store, rank=spec["rank"], world_size=spec["world_size"])

    def before(self, request: dict) -> None:
        from .parallel import set_layout

        set_layout(request["layout"], request["seed"])

    def after(self) -> None:
        import torch.distributed as dist

        if not dist.is_initialized():
            raise RuntimeError("the task destroyed the process group of its world; leave torch.distributed up")


class _Fake:
    """Any rank of a world of any size that does not exist, one after the other."""

    def __init__(self, spec: dict):
        self.record = _record(call_host(spec["host"]))

    def before(self, request: dict) -> None:
        from .parallel import set_fake_world, set_layout

        set_fake_world(request["world_size"], request["rank"])
        set_layout(request["layout"], request["seed"])

    def after(self) -> None:
        pass


class _Clean:
    """A process that computes references: it must never see megatron, a stand-in or the host."""

    record = None

    def __init__(self, spec: dict):
        self.after()

    def before(self, request: dict) -> None:
        pass

    def after(self) -> None:
        from .clean import contamination

        found = contamination()
        if found:
            raise RuntimeError(
                f"the clean world holds {', '.join(found)}: its results are no reference; "
                "move the task into a module that imports only torch and transformers"
            )


_MODES = {"ranks": _Ranks, "fake": _Fake, "clean": _Clean}


def _record(record):
    """The host's record as plain data, when it has any."""
    return record.as_dict() if hasattr(record, "as_dict") else record if isinstance(record, dict) else None
