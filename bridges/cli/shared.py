"""What the commands share: options, arguments and how they speak (results on stdout, everything else on stderr, rank 0 alone)."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import BridgeError, CheckpointError, ConfigError, nearest
from ..progress import first_rank

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A config.json, a model folder, or a registered hub id.")]
Plan = Annotated[str, typer.Option("--plan", metavar="PLAN", help="Parallel plan, e.g. tp2,pp2,vpp2,sp,split2-1-1-1.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]
AllowField = Annotated[
    list[str] | None, typer.Option("--allow-field", metavar="FIELD", help="An unknown config field you vouch for (repeatable).")
]

_ERROR_CHARS = 2000  # of a rank's message: the whole is shown by --debug


# ------------------------------------------------------------------------------------------------------------- arguments
def read_model_config(name: str) -> dict[str, Any]:
    """config.json from what CONFIG names. Raises ConfigError naming the nearest registered models."""
    from shardproof import fixtures

    from ..auto import read_config

    if Path(name).exists():
        return read_config(Path(name))
    if name in fixtures.names():
        return fixtures.published(name)
    short = {n.split("/")[-1]: n for n in fixtures.names()}
    near = nearest(name, fixtures.names()) or nearest(name.split("/")[-1], short)
    raise ConfigError(f"{name!r} is no file, no folder and no registered hub id{near}; give a config.json or a model folder")


def bind(name: str, allow_fields: Sequence[str] | None = None):
    """The architecture of what CONFIG names."""
    from ..families import find_family

    config = read_model_config(name)
    return find_family(config).architecture(config, allow_fields=tuple(allow_fields or ()))


def existing_folder(path: Path) -> Path:
    """`path`, where it is a folder; a hub id is not downloaded behind the user's back. Raises CheckpointError."""
    if path.is_dir():
        return path
    hint = ""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.parent.exists():
        hint = f"; if it is a hub id, download it first: hf download {path} --local-dir DIR"
    raise CheckpointError(f"{path} {'is a file' if path.exists() else 'does not exist'}; name a folder{hint}")


def free_output(path: Path, overwrite: bool) -> None:
    """Refuse an output that holds something, before any work is done for it. Raises CheckpointError."""
    if path.exists() and not overwrite and (not path.is_dir() or any(not p.name.startswith(".") for p in path.iterdir())):
        raise CheckpointError(f"output {path} exists; name a new folder or pass --overwrite")


def layout(plan: Any) -> dict[str, int]:
    """What a world's parallel_state is initialised with for a plan; data parallelism is what is left of the world."""
    sizes = {name: getattr(plan, name) for name in ("tp", "pp", "cp", "ep", "etp")}
    return sizes | ({"vpp": plan.vpp} if plan.vpp > 1 else {})


def launched_ranks() -> int:
    """Ranks that the launcher (torchrun) started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


# ---------------------------------------------------------------------------------------------------------------- speech
def note(text: str) -> None:
    """A line on stderr for the one who waits."""
    if first_rank():
        typer.echo(text, err=True)


@contextlib.contextmanager
def only_results_on_stdout() -> Iterator[None]:
    """What libraries print goes to stderr while the block runs."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def emit(result: Any) -> None:
    """Print a result as JSON; numbers that JSON does not have become text."""
    if first_rank():
        typer.echo(json.dumps(_plain(result), indent=2, ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value - value != 0:  # nan and both infinities
        return str(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, styles: Sequence[str | None] = ()) -> None:
    """Print a table; `styles` are of the rows. Nothing is cut off where the output is no terminal."""
    if not first_rank():
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        out.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    for number, row in enumerate(rows):
        out.add_row(*(Text(cell) for cell in row), style=styles[number] if styles else None)
    Console(width=None if sys.stdout.isatty() else 240).print(out)


def say(text: str) -> None:
    """A line of the result on stdout."""
    if first_rank():
        typer.echo(text)


def counted(count: int, word: str) -> str:
    """1 rank, 2 ranks."""
    return f"{count} {word}{'s' * (count != 1)}"


def amount(count: float, units: Sequence[str] = ("", " K", " M", " B", " T", " P", " E")) -> str:
    """A large number as people read it: 1.54 B, 12.3 M."""
    for unit in units[:-1]:
        if abs(count) < 1000:
            return f"{count:.3g}{unit}" if unit else f"{count:g}"
        count /= 1000
    return f"{count:.3g}{units[-1]}"


# ---------------------------------------------------------------------------------------------------------------- errors
def on_purpose(problem: Exception) -> bool:
    """Whether an error was made on purpose, with a message that says the remedy."""
    worlds = sys.modules.get("shardproof.conformance.worlds.errors")
    return isinstance(problem, BridgeError) or bool(worlds and isinstance(problem, worlds.WorldError))


def one_line(problem: BaseException) -> str:
    """An error's message without a rank's traceback and output."""
    if hasattr(problem, "traceback_text"):  # a RankError
        own = is_bridge_error(problem.type_name)
        text = problem.message if own or problem.died else f"{problem.type_name}: {problem.message}"
        text = f"rank {problem.rank} of {problem.world_size}: {text}"
    else:
        text = str(problem) if isinstance(problem, BridgeError) else str(problem).split("\n---")[0]
    return " ".join(text.split())[:_ERROR_CHARS]


def is_bridge_error(name: str) -> bool:
    """Whether a rank's error type is one of the bridges', made on purpose."""
    from .. import errors

    return isinstance(getattr(errors, name, None), type)


def tell_error(problem: Exception) -> None:
    """One red line on stderr, told by one rank.

    By rank 0 where all meet the same error, as they do before they are joined; else by the first to fail: it may be the only one.
    """
    rank, alone = os.environ.get("RANK", "0"), _joined() and not getattr(problem, "agreed", False)
    if _first_to_fail() if alone else rank == "0":
        text = one_line(problem).replace("`allow_fields`", "`allow_fields` (--allow-field)")
        typer.secho(f"error: {f'rank {rank}: ' if alone and rank != '0' else ''}{text}", fg="red", err=True)


def _joined() -> bool:
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_initialized() and dist.get_world_size() > 1


def _first_to_fail() -> bool:
    try:
        from torch.distributed.distributed_c10d import _get_default_store

        return _get_default_store().add("shardproof/failed", 1) == 1
    except Exception:  # the store may have gone with the rank that held it: two messages are better than none
        return True


def leave_ranks() -> None:
    """End torch.distributed where it runs; NCCL complains at exit otherwise."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------------------- imports
def quiet_imports() -> None:
    """Silence what torch and megatron-core say about absent packages on every import: the host's record says it once."""
    for module in ("megatron", "torch", "shardproof.bridges.host"):  # the last: torch's warnings, met inside a stand-in
        warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
    for name in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def fast_imports() -> Iterator[None]:
    """Import without garbage collection: it walks a million new objects again and again, for a tenth of the time."""
    import gc

    from ..meta import uncollected

    with uncollected():
        try:
            yield
        finally:
            gc.freeze()


def megatron() -> None:
    """Import what conversions need of megatron-core and torch."""
    from .. import host

    host.install()
    import megatron.core.dist_checkpointing
    import megatron.core.models.gpt  # noqa: F401
    import torch.distributed.checkpoint  # noqa: F401


class Stopwatch:
    """Seconds since this process was launched, the interpreter's own start included."""

    def __init__(self):
        import psutil

        self.launched = psutil.Process().create_time()
        self.first: float | None = None

    def seconds(self) -> float:
        """Since the launch."""
        return time.time() - self.launched

    def mark_first(self) -> None:
        """Remember the first call."""
        if self.first is None:
            self.first = self.seconds()
