"""This side of the door: an adapter object that stands for one in another interpreter."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import subprocess
import tempfile
import threading
import time
from functools import partial
from typing import Any

from ..api import NotRun, rank_members
from ..worlds.errors import section
from ..worlds.interpreter import command, environment, interpreter
from .errors import DoorError, RemoteError

START_S, CALL_S = 300.0, 180.0  # an adapter may import all of its bridge, megatron and compiled kernels included
TAIL = 4000


class RemoteAdapter:
    """An adapter in another interpreter; has the members that it has there.

    `python`: the interpreter's path; `rank_name`: the adapter's name there, which ranks load; `versions`: of what is there;
    `misfits`: sentences about members that do not have the protocol's shape.
    Methods are called in a helper process, one at a time, with JSON-able arguments. Rank methods cannot be called here.
    A helper that crashed or hung is replaced at the next call. Raises DoorError when it cannot be started.
    """

    def __init__(self, python: str, name: str):
        self.python, self.rank_name = interpreter(python), name
        self._helper: Helper | None = None
        self._lock = threading.Lock()
        about = self._live().about
        self._methods, self._rank = set(about["methods"]), set(about["rank"])
        self.versions, self.misfits = about["versions"], about["misfits"]
        for member, value in about["values"].items():
            if member not in ("python", "rank_name", "versions", "misfits"):
                setattr(self, member, value)

    def __getattr__(self, member: str) -> Any:
        if member.startswith("_") or member not in self._methods:
            raise AttributeError(f"adapter {self.rank_name} in {self.python} has no {member}")
        return partial(self._elsewhere if member in self._rank else self.call, member)

    def call(self, member: str, *args: Any, timeout: float = CALL_S, **kwargs: Any) -> Any:
        """Call a test-process method. Raises RemoteError for what it raised, DoorError when its process ended or did not answer."""
        with self._lock:
            return self._live().ask({"call": member, "args": args, "kwargs": kwargs}, f"{self.rank_name} {member}", timeout)

    def close(self) -> None:
        """End the helper process; a later call starts another."""
        if self._helper is not None:
            self._helper.close()
            self._helper = None

    def _elsewhere(self, member: str, *args: Any, **kwargs: Any) -> None:
        raise DoorError(
            f"{member} runs in ranks of {self.python}: call it in a task of a world, with load_adapter({self.rank_name!r})"
        )

    def _live(self) -> Helper:
        if self._helper is None or not self._helper.alive:
            self.close()
            self._helper = Helper(self.python, self.rank_name)
        return self._helper


class Helper:
    """One helper process: JSON lines over two pipes; its stdout and stderr in a file. `about`: what the adapter is."""

    def __init__(self, python: str, name: str):
        self.python, self.owner, self.buffer = python, os.getpid(), b""
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        their_read, self.write = os.pipe()
        self.read, their_write = os.pipe()
        call = command(python, "shardproof.conformance.door.helper:main", their_read, their_write, name, list(rank_members()))
        self.process = subprocess.Popen(
            call,
            pass_fds=[their_read, their_write],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
            env=environment(python),
        )
        os.close(their_read)
        os.close(their_write)
        _LIVE.append(self)
        self.about = self.answer(f"loading adapter {name}", START_S)

    @property
    def alive(self) -> bool:
        """Whether this process started it and it still runs."""
        return self.owner == os.getpid() and self.process.poll() is None

    def ask(self, request: dict, what: str, timeout: float) -> Any:
        """Send one request; its result."""
        try:
            line = json.dumps(request)
        except TypeError as error:
            raise DoorError(f"{what}: {error}; only JSON goes through the door") from None
        with contextlib.suppress(BrokenPipeError):  # it ended: the answer says how
            _write_all(self.write, line.encode() + b"\n")
        return self.answer(what, timeout)

    def answer(self, what: str, timeout: float) -> Any:
        """The next answer. Raises what the adapter raised; ends the process when none comes."""
        line = self._line(time.monotonic() + timeout)
        if line is None:
            raise self._failure(f"{what}: no answer after {timeout:g} s")
        if not line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
            raise self._failure(f"{what}: its process ended with code {self.process.poll()}")
        try:
            found = json.loads(line)
        except ValueError:
            raise self._failure(f"{what}: its process wrote {line[:200]!r}, which is no answer") from None
        if "error" in found:
            type_name, message, text = found["error"]
            raise NotRun(message) if type_name == NotRun.__name__ else RemoteError(type_name, message, text)
        return found["result"]

    def close(self) -> None:
        """End the process."""
        if self in _LIVE:
            _LIVE.remove(self)
        if self.owner != os.getpid():
            return
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for end in (self.read, self.write):
            with contextlib.suppress(OSError):
                os.close(end)
        self.read = self.write = -1
        self.log.close()

    def _line(self, end: float) -> bytes | None:
        """One line; empty when the process closed its end, None when time is over."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.read, selectors.EVENT_READ)
            while b"\n" not in self.buffer:
                if not selector.select(max(0.0, end - time.monotonic())):
                    return None
                data = os.read(self.read, 1 << 16)
                if not data:
                    return b""
                self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line

    def _failure(self, words: str) -> DoorError:
        self.log.seek(0)
        tail = self.log.read().decode(errors="replace")[-TAIL:]
        self.close()
        return DoorError(f"{words} (interpreter {self.python}){section('its output (tail)', tail)}")


_LIVE: list[Helper] = []


@atexit.register
def _close_all() -> None:
    for helper in list(_LIVE):
        helper.close()


def _write_all(end: int, data: bytes) -> None:
    while data:
        data = data[os.write(end, data) :]
