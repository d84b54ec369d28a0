"""The fork server: one single-threaded process that imports what is heavy once and forks workers on request.

Not multiprocessing's own: that one is a process-wide singleton (a clean oracle needs a second one that never saw
megatron), re-imports the caller's `__main__` in each child, and drops a preload that fails without a word.

Other processes may ask too (pytest-xdist's workers), through a listening socket that the parent gave out: their workers are theirs.

A server may itself be forked from another, and imports on top of what that one has: the clean world's is the ground of those with a host.

Protocol on a control socket, parent to server: one byte, then a pickled body.
  b"S"  spawn; carries the descriptors (connection, status[, door]); body: the worker's spec, of mode "server" for a further server
  b"K"  body: (pid, signal number); sent on only to a child that was not reaped, so a reused pid is never hit
On a worker's status pipe the server writes ("pid", pid) and, when it ends, ("exit", code).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import selectors
import shutil
import signal
import socket
import sys
from functools import partial
from multiprocessing.connection import Connection

PARENT_POLL_S = 1.0


def main(control_fd: int, door_fd: int | None = None) -> None:
    """Entry point of the server process: preload, then serve until the parent closes the socket or is gone."""
    parent = os.getppid()
    control = socket.socket(fileno=control_fd)
    messages = Connection(os.dup(control_fd))
    config = messages.recv()
    preload(config["host"], config["preload"])
    door = None if door_fd is None else socket.socket(fileno=door_fd)
    server = _Server(control, messages, parent, door)
    try:
        server.serve()
    finally:
        server.kill_all()
        shutil.rmtree(config["folder"], ignore_errors=True)
        os._exit(0)


def preload(host: str | None, modules: tuple[str, ...]) -> None:
    """Call the host, then import `modules`: the host must stand before the first import of megatron.core."""
    import torch

    torch.set_num_threads(1)  # before anything computes: a pool of OpenMP threads does not survive a fork
    call_host(host)
    for name in modules:
        importlib.import_module(name)
    import gc

    gc.collect()
    gc.freeze()  # children share these pages, and their collections skip them


def call_host(host: str | None):
    """Call "module:function" without arguments and give back its record; nothing for None."""
    if host is None:
        return None
    module, _, function = host.partition(":")
    return getattr(importlib.import_module(module), function)()


class _Server:
    def __init__(self, control: socket.socket, messages: Connection, parent: int, door: socket.socket | None):
        self.parent, self.door = parent, door
        self.callers: dict[socket.socket, Connection] = {control: messages}  # the parent first, then guests
        self.status: dict[int, Connection] = {}  # children that were not reaped yet
        self.wake_r, self.wake_w = os.pipe()
        for fd in (self.wake_r, self.wake_w):
            os.set_blocking(fd, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # an ignored signal would not write to the wake-up pipe
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "running", False))
        signal.set_wakeup_fd(self.wake_w)
        self.selector = selectors.DefaultSelector()
        self.selector.register(control, selectors.EVENT_READ, partial(self.on_control, control, messages))
        if door is not None:
            self.selector.register(door, selectors.EVENT_READ, self.on_guest)
        self.selector.register(self.wake_r, selectors.EVENT_READ, self.on_child)
        self.running = True

    def serve(self) -> None:
        while self.running:
            for key, _ in self.selector.select(PARENT_POLL_S):
                key.data()
            # a forked relative of the parent may hold the socket open: end of file alone is not enough
            if os.getppid() != self.parent:
                self.running = False

    def on_guest(self) -> None:
        control, _ = self.door.accept()
        messages = self.callers[control] = Connection(os.dup(control.fileno()))
        self.selector.register(control, selectors.EVENT_READ, partial(self.on_control, control, messages))

    def on_control(self, control: socket.socket, messages: Connection) -> None:
        try:
            kind, fds, _, _ = socket.recv_fds(control, 1, 8)
            body = messages.recv() if kind else None
        except (OSError, EOFError):
            kind = b""
        if not kind and control is not next(iter(self.callers)):
            self.selector.unregister(control)
            for end in (control, self.callers.pop(control)):
                end.close()
        elif not kind:
            self.running = False
        elif kind == b"S":
            self.spawn(body, *fds)
        elif kind == b"K" and body[0] in self.status:
            with contextlib.suppress(ProcessLookupError):
                os.kill(*body)

    def spawn(self, spec: dict, conn_fd: int, status_fd: int, *door_fd: int) -> None:
        status = Connection(status_fd, readable=False)
        server_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            self.become(spec, conn_fd, status, server_pid, *door_fd)
        for fd in (conn_fd, *door_fd):
            os.close(fd)
        self.status[pid] = status
        self.tell(status, ("pid", pid))

    def become(self, spec: dict, conn_fd: int, status: Connection, server_pid: int, *door_fd: int) -> None:
        """In the child: let go of the server's descriptors, then work, or serve; never returns."""
        code = 1
        try:
            die_with_parent(server_pid)
            os.setpgid(0, 0)  # what a task starts itself belongs to this group, and ends with it
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            self.selector.close()
            doors = [self.door] if self.door else []
            for end in (*self.callers, *self.callers.values(), *doors, status, *self.status.values()):
                end.close()
            os.close(self.wake_r)
            os.close(self.wake_w)
            from . import worker

            if spec["mode"] == "server":
                worker.stand_in(spec)
                main(conn_fd, *door_fd)
            worker.main(Connection(conn_fd), spec)
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def on_child(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self.wake_r, 4096)
        self.reap(os.WNOHANG)

    def reap(self, flags: int) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, flags)
            except ChildProcessError:
                return
            if pid == 0:
                return
            end = self.status.pop(pid, None)
            if end is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)  # children that the worker left behind
                self.tell(end, ("exit", os.waitstatus_to_exitcode(status)))
                end.close()

    def kill_all(self) -> None:
        for pid in self.status:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.reap(0)

    @staticmethod
    def tell(status: Connection, event: tuple) -> None:
        with contextlib.suppress(OSError):  # the parent may have let go of this worker
            status.send(event)


def die_with_parent(parent: int) -> None:
    """Linux: have the kernel kill this process when its parent ends, even in a collective that never returns."""
    if sys.platform == "linux":
        import ctypes

        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call above
        os._exit(1)
