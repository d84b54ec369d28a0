"""A world of one process that is replaced when it fails: what the clean and the fake world share."""

from __future__ import annotations

from collections.abc import Sequence

from .launcher import shared_server
from .workers import Workers


class Solo:
    """One persistent worker of a given mode; started when first used, replaced after a failure."""

    def __init__(self, mode: str, *, host: str | None, preload: Sequence[str], start_timeout: float, python: str | None = None):
        self._spec = {"mode": mode, "host": host}
        self._server, self._start_timeout = (host, tuple(preload), python), start_timeout
        self._workers: Workers | None = None
        self.start_seconds: list[float] = []
        shared_server(*self._server)  # it imports while the caller does other things

    def exchange(self, request: dict, timeout: float):
        """Send one request; its result. Errors as in Workers.exchange."""
        return self.worker().exchange(request, timeout)[0]

    def worker(self) -> Workers:
        """The live worker."""
        if self._workers is None or not self._workers.healthy():
            self._workers = Workers(shared_server(*self._server), 1, self._spec, start_timeout=self._start_timeout)
            self.start_seconds.append(self._workers.start_seconds)
        return self._workers

    def close(self) -> None:
        """End the worker; a later exchange starts a new one."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None


class OneProcess:
    """What a world of one process shows outside: its starts, its end, use in a ``with`` block. `_solo` is its worker."""

    _solo: Solo

    @property
    def start_seconds(self) -> list[float]:
        """Seconds of each start so far."""
        return self._solo.start_seconds

    def close(self) -> None:
        """End the process; a later run starts a new one."""
        self._solo.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        self.close()
