"""The parent's side of fork servers: starting, sharing and ending them."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

from .errors import WorldError, section
from .interpreter import command, environment

# What the clean world imports: all that model files of transformers do, so that a fresh process computes its first reference in 0.1 s, not in 2 s.
PRELOAD_CLEAN = (
    "torch",
    "torch._dynamo",
    "transformers",
    "transformers.modeling_utils",
    "transformers.modeling_layers",
    "transformers.masking_utils",
)

# One thread for every numeric library of the server (a fork with live threads is unsafe) and of the ranks.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# A CPU world is the same on a machine with GPUs. A GPU world must not start CUDA in the server: its forked ranks could not use it then.
_ON_THE_CPU = {"CUDA_VISIBLE_DEVICES": ""}
_ON_GPUS = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


class Server:
    """A fork server with `host` called and `preload` imported; comes up in the background.

    `host`: "module:function" or None. `python`: the interpreter of the server and its workers, None for this one. `gpu`: whether
    they see the machine's CUDA devices. `ground`: a server to fork this one from, on the CPU and in this interpreter. `folder` is the
    server's temporary folder: logs, stacks, stores; it goes when the server ends, also when the parent was killed. `door`: a path there
    where other processes may ask for workers (see Guest), with `open_door`.
    """

    def __init__(
        self,
        host: str | None,
        preload: tuple[str, ...],
        python: str | None = None,
        *,
        gpu: bool = False,
        ground: Server | None = None,
        open_door: bool = False,
    ):
        self.host, self.preload, self.python, self.owner = host, tuple(preload), python, os.getpid()
        self.folder = tempfile.mkdtemp(prefix="shardproof-", dir=ground and ground.folder)
        self.log = Path(self.folder, "server.log")
        self.lock = threading.Lock()
        self.control, child = socket.socketpair()
        self.door = Path(self.folder, "door") if open_door else None
        listener = _listening(self.door) if self.door else contextlib.nullcontext()
        with child, listener as door:
            ends = [end.fileno() for end in (child, door) if end]
            self.process = Forked(ground, self.log, ends) if ground else _started(python, gpu, self.log, ends)
        self.messages = Connection(os.dup(self.control.fileno()))
        with contextlib.suppress(OSError):  # it died at once: the first spawn says so
            self.messages.send({"host": host, "preload": self.preload, "folder": self.folder})

    @property
    def alive(self) -> bool:
        """True while the server process runs and this process is the one that started it."""
        return self.owner == os.getpid() and self.process.poll() is None

    def spawn(self, spec: dict) -> tuple[Connection, Connection]:
        """Ask for a worker; gives (connection, status), at once, also while the server still imports.

        Raises WorldError when the server is gone.
        """
        conn, conn_child = Pipe()
        with conn_child:
            return conn, self.fork(spec, [conn_child.fileno()])

    def fork(self, spec: dict, ends: list[int]) -> Connection:
        """Ask for a child that has these descriptors; gives its status pipe. Raises WorldError when the server is gone."""
        status, status_child = Pipe(duplex=False)
        try:
            with self.lock, status_child:
                socket.send_fds(self.control, [b"S"], [ends[0], status_child.fileno(), *ends[1:]])
                self.messages.send(spec)
        except OSError as error:
            raise self.death() from error
        return status

    def signal(self, pid: int, number: int) -> None:
        """Send a signal to a worker through the server, which knows whether the pid still is that worker."""
        with self.lock, contextlib.suppress(OSError):
            socket.send_fds(self.control, [b"K"], [])
            self.messages.send((pid, number))

    def death(self) -> WorldError:
        """The error that says why the server is gone."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        tail = self.log.read_text(errors="replace")[-4000:] if self.log.exists() else ""
        return WorldError(
            f"the fork server ended with code {self.process.poll()} (host {self.host}, preload "
            f"{list(self.preload)}); check that these import in {self.python or 'a plain interpreter'}"
            f"{section('output of the server (tail)', tail)}"
        )

    def close(self) -> None:
        """End the server and with it all its workers; remove its folder."""
        if self.owner != os.getpid():  # a fork of the parent has no say
            return
        self.messages.close()
        self.control.close()
        self.process.terminate()  # it may still import, and would read the end of the socket only after that
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class Forked:
    """A server's process, forked from its ground; shown like a subprocess.Popen. It ends with its ground at the latest."""

    def __init__(self, ground: Server, log: Path, ends: list[int]):
        spec = {"mode": "server", "log": str(log), "cwd": os.getcwd(), "sys_path": list(sys.path)}
        self.ground, self.status = ground, ground.fork(spec, ends)
        self.pid: int | None = None
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, None while it runs or waits for its ground's imports."""
        self._look(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        """The exit code. None for a process that is not forked yet: it will find its socket closed. Raises subprocess.TimeoutExpired."""
        end = None if timeout is None else time.monotonic() + timeout
        self._look(0)
        while self.pid and self.returncode is None:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise subprocess.TimeoutExpired("fork server", timeout)
            self._look(left)
        return self.returncode

    def terminate(self) -> None:
        """SIGTERM, if it is there."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, if it is there."""
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        self._look(0)
        if self.pid and self.returncode is None:
            self.ground.signal(self.pid, number)

    def _look(self, seconds: float | None) -> None:
        while self.returncode is None and self.status.poll(seconds):
            try:
                kind, value = self.status.recv()
            except (EOFError, OSError):  # the ground is gone, and kills what it forked
                kind, value = "exit", -signal.SIGKILL
            if kind == "pid":
                self.pid = value
            else:
                self.returncode = value
            seconds = 0


def _started(python: str | None, gpu: bool, log: Path, ends: list[int]) -> subprocess.Popen:
    with log.open("wb") as out:
        return subprocess.Popen(
            command(python, "shardproof.conformance.worlds.server:main", *ends),
            pass_fds=ends,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            env={**environment(python), **_ENVIRONMENT, **(_ON_GPUS if gpu else _ON_THE_CPU)},
        )


class Guest(Server):
    """Another process's fork server, through its door: it imported once what both need. Its workers here end with this process."""

    def __init__(self, server: tuple, door: str):
        self.host, self.preload, self.python, self.gpu = server
        self.owner, self.lock = os.getpid(), threading.Lock()
        self.control = socket.socket(socket.AF_UNIX)
        self.control.connect(door)
        self.messages = Connection(os.dup(self.control.fileno()))
        self.folder = tempfile.mkdtemp(prefix="shardproof-")

    @property
    def alive(self) -> bool:
        """Whether the server still holds its end, and this process is the one that knocked."""
        if self.owner != os.getpid():
            return False
        try:
            return self.control.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def death(self) -> WorldError:
        """The error that says why the server is gone."""
        return WorldError(
            f"the fork server that this process shares with the one that started it has ended (host {self.host}, preload "
            f"{list(self.preload)}); check that these import in a plain interpreter"
        )

    def close(self) -> None:
        """Let go of the server, which ends with its own parent."""
        if self.owner == os.getpid():
            self.messages.close()
            self.control.close()
            shutil.rmtree(self.folder, ignore_errors=True)


def _listening(path: Path) -> socket.socket:
    door = socket.socket(socket.AF_UNIX)
    door.bind(str(path))
    door.listen()
    return door


_SERVERS: dict[tuple, Server] = {}
_DOORS: dict[tuple, str] = {}  # of other processes' servers
_VARIABLE = "SHARDPROOF_SERVERS"
_LOCK = threading.Lock()


def lend(host: str | None, preload: tuple[str, ...]) -> tuple[tuple, str]:
    """Start a server that other processes may use; what `borrow` takes there."""
    key = (host, tuple(preload), None, False)
    if path := door(key):
        return key, path
    with _LOCK:
        server = _SERVERS[os.getpid(), *key] = Server(*key[:2], ground=_ground(*key), open_door=True)
    return key, str(server.door)


def borrow(lent: list[tuple[tuple, str]]) -> None:
    """From here on `shared_server` gives these servers of another process, while they live."""
    _DOORS.update(lent)


def lent_to_children(lent: list[tuple[tuple, str]]) -> dict[str, str]:
    """The environment variable that tells processes of this same package of servers that they may use."""
    return {_VARIABLE: json.dumps({"of": __file__, "servers": lent})}


def door(key: tuple) -> str | None:
    """Where another process's server for (host, preload, interpreter, devices or none) is, if one was lent to this process."""
    told = json.loads(os.environ.get(_VARIABLE, "{}"))
    inherited = told.get("servers", []) if told.get("of") == __file__ else []
    found = {(host, tuple(preload), python, gpu): path for (host, preload, python, gpu), path in inherited}
    return (found | _DOORS).get(key)


def shared_server(host: str | None, preload: tuple[str, ...], python: str | None = None, *, gpu: bool = False) -> Server:
    """The server of this process for (host, preload, interpreter, devices or none); started when there is none alive."""
    with _LOCK:
        return _shared(host, tuple(preload), python, gpu)


def _shared(*key) -> Server:
    """Under the lock: the living server of a key."""
    old = _SERVERS.get((os.getpid(), *key))
    if old is None or not old.alive:
        if old is not None:
            old.close()  # a killed server could not remove its folder
        host, preload, python, gpu = key
        _SERVERS[os.getpid(), *key] = _guest(key) or Server(host, preload, python, gpu=gpu, ground=_ground(*key))
    return _SERVERS[os.getpid(), *key]


def _ground(host: str | None, preload: tuple[str, ...], python: str | None, gpu: bool) -> Server | None:
    """What a server is forked from, under the lock: a host's world that imports transformers from the clean one, which has most of it."""
    apart = host is None or python or gpu or "transformers" not in preload
    return None if apart else _shared(None, PRELOAD_CLEAN, None, False)


def _guest(key: tuple) -> Guest | None:
    try:
        return Guest(key, path) if (path := door(key)) else None
    except OSError:  # it is gone
        return None


@atexit.register
def shutdown() -> None:
    """End all fork servers that this process started, with their workers; a later use starts new ones."""
    with _LOCK:
        for key in [k for k in _SERVERS if k[0] == os.getpid()]:
            _SERVERS.pop(key).close()
