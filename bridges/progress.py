"""Progress on stderr: a bar in a terminal, a line now and then where there is none; rank 0 alone shows it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

LINE_EVERY_S = 10.0  # a log wants signs of life, not one line a tensor


def first_rank() -> bool:
    """Whether this process speaks for the run: rank 0 of torch.distributed, before that of the launcher's environment."""
    dist = sys.modules.get("torch.distributed")  # a look, not an import: most commands never need torch
    if dist is not None and getattr(dist, "is_initialized", lambda: False)():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def advancing(label: str, total: int) -> Iterator[Callable[[str], None]]:
    """Give a function to call with the name of every finished tensor, `total` times; it shows how far the work is."""
    if not first_rank():
        yield lambda name: None
    elif sys.stderr.isatty():
        with _bar(label, total) as advance:
            yield advance
    else:
        yield _lines(label, total)


def tracked[T: tuple](stream: Iterable[T], label: str, total: int) -> Iterator[T]:
    """The elements (name, ...) of `stream`, with progress while they are taken."""
    with advancing(label, total) as advance:
        for element in stream:
            advance(element[0])
            yield element


@contextmanager
def _bar(label: str, total: int) -> Iterator[Callable[[str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    now, console = TextColumn("{task.fields[name]}", markup=False), Console(stderr=True)
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), now)
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=total, name="")
        yield lambda name: progress.update(task, advance=1, name=name)


def _lines(label: str, total: int) -> Callable[[str], None]:
    done, due = 0, time.monotonic() + LINE_EVERY_S

    def advance(name: str) -> None:
        nonlocal done, due
        done += 1
        if time.monotonic() >= due:
            print(f"{label}: {done} of {total}, {name}", file=sys.stderr, flush=True)
            due = time.monotonic() + LINE_EVERY_S

    return advance
