"""What a crash would leave: every state that a folder passes through while something is written into it.

A killed process leaves what the kernel has at that moment: no buffer of its own, no clean-up. So one save that is watched shows what a
kill at each of its steps would leave. Watched is every return from a C function (that is where files change), in all threads and in forked
children; a state is copied when names, sizes or times differ from the last one's. Of one growing file the first GROWTHS lengths are kept.
"""

from __future__ import annotations

import collections
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What changes no file: methods of plain values, modules that only compute, calls that only look.
_VALUES = (str, bytes, bytearray, int, float, list, tuple, dict, set, frozenset, type, re.Pattern, re.Match, collections.deque)
_COMPUTING = re.compile("builtins|math|time|_json|_struct|itertools|_operator|_thread|_functools|_abc|_sre|gc")
_LOOKING = re.compile("[lf]?stat|scandir|listdir|fspath|getpid|getcwd|fsync|urandom|get|read|access|tell|size|rank|intern")
GROWTHS = 3


@contextmanager
def watched(live: Path, states: Path) -> Iterator[None]:
    """Copy every state of the folder `live` to ``states/<time>-<process>`` while the block runs."""
    states.mkdir(parents=True)
    log = _Log(live, states)
    before = sys.getprofile()
    threading.setprofile_all_threads(log.look)
    sys.setprofile(log.look)
    try:
        yield
    finally:
        sys.setprofile(before)
        threading.setprofile_all_threads(before)


class _Log:
    """The states so far: the last one seen, where its copy is, and how often each file has grown."""

    def __init__(self, live: Path, states: Path):
        self.live, self.states = live, states
        self.last, self.copy, self.grown = _seen(live), None, collections.Counter()
        self.lock = threading.Lock()

    def look(self, frame, event, function) -> None:
        """The profiler: called at every call and return."""
        if event not in ("c_return", "c_exception") or _harmless(function) or not self.lock.acquire(blocking=False):
            return
        try:
            now = _seen(self.live)
            if now != self.last and self._news(now):
                self._keep(now)
            self.last = now
        finally:
            self.lock.release()

    def _news(self, now: dict) -> bool:
        """Whether more happened than that a file grew once more."""
        changed = [path for path in now.keys() | self.last.keys() if now.get(path) != self.last.get(path)]
        if any(path not in now or path not in self.last or now[path][2] != self.last[path][2] for path in changed):
            return True
        self.grown.update(changed)
        return any(self.grown[path] <= GROWTHS for path in changed)

    def _keep(self, now: dict) -> None:
        """Copy a state; one that changed meanwhile, by another thread or process, never was and is dropped."""
        to = self.states / f"{time.monotonic_ns():020}-{os.getpid()}"
        try:
            to.mkdir()
            for path, about in sorted(now.items()):
                self._copy(path, about, to)
            whole = _seen(self.live) == now
        except OSError:
            whole = False
        if not whole:
            shutil.rmtree(to, ignore_errors=True)
        else:
            self.copy = (to, now)

    def _copy(self, path: str, about: tuple, to: Path) -> None:
        place = os.path.relpath(path, self.live)
        if about[3]:
            (to / place).mkdir()
        elif self.copy and self.copy[1].get(path) == about:
            os.link(self.copy[0] / place, to / place)
        else:
            shutil.copyfile(path, to / place)


def _harmless(function) -> bool:
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", None) or ""
    if isinstance(owner, _VALUES) or _LOOKING.fullmatch(name) or type(owner).__module__ in ("torch", "numpy"):
        return True
    return bool(_COMPUTING.fullmatch(str(getattr(owner, "__name__", ""))))


def _seen(folder: Path) -> dict[str, tuple]:
    """{path: (size, time of change, inode, is a folder)} of everything below a folder."""
    found, open_ = {}, [str(folder)]
    while open_:
        try:
            with os.scandir(open_.pop()) as entries:
                for entry in entries:
                    about, is_folder = entry.stat(follow_symlinks=False), entry.is_dir(follow_symlinks=False)
                    # a folder's own size and time tell nothing that its entries do not
                    found[entry.path] = (0, 0, about.st_ino, True) if is_folder else (*_file(about), False)
                    if is_folder:
                        open_.append(entry.path)
        except OSError:  # gone meanwhile: another look follows
            continue
    return found


def _file(about: os.stat_result) -> tuple[int, int, int]:
    return about.st_size, about.st_mtime_ns, about.st_ino
