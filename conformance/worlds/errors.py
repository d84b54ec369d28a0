"""What can go wrong in a world, as exceptions that name the rank, the cause and the remedy."""

from __future__ import annotations

import signal

# How a rank words the loss of a peer (gloo's TCP pairs, NCCL's watchdog): a consequence, never the cause.
_PEER_LOSS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "pair closure",
    "Connection refused",
    "remote process exited",
    "NCCL communicator was aborted",
)


class WorldError(RuntimeError):
    """A world cannot be started or used as asked.

    Base class of everything that this package raises; the message says the remedy.
    """


class RankError(WorldError):
    """One rank failed: it raised, or its process ended.

    Attributes: `rank` (int), `world_size` (int), `type_name` (str; "ProcessDied" when the process ended), `message`
    (str), `traceback_text` (str, empty when the process ended), `output` (str, the tail of what the rank wrote to
    stdout and stderr during the task).
    """

    def __init__(
        self, rank: int, type_name: str, message: str, traceback_text: str = "", output: str = "", *, world_size: int = 0
    ):
        self.rank, self.type_name, self.message = rank, type_name, message
        self.traceback_text, self.output, self.world_size = traceback_text, output, world_size
        super().__init__(self._text())

    @property
    def died(self) -> bool:
        """True when the rank's process ended, false when it raised."""
        return self.type_name == "ProcessDied"

    @property
    def peer_loss(self) -> bool:
        """True when the rank only reports that another rank went away."""
        return not self.died and any(words in self.message for words in _PEER_LOSS)

    def _text(self) -> str:
        of = f" of {self.world_size}" if self.world_size else ""
        head = f"rank {self.rank}{of} {self.message if self.died else f'raised {self.type_name}: {self.message}'}"
        parts = [head]
        if self.traceback_text:
            parts.append(self.traceback_text.rstrip())
        return "\n".join(parts) + section(f"output of rank {self.rank} (tail)", self.output)

    def __reduce__(self):
        args = (self.rank, self.type_name, self.message, self.traceback_text, self.output)
        return _rebuild_rank_error, (args, self.world_size)


class RankTimeout(WorldError):
    """Some ranks had not finished when the time was over.

    Attributes: `ranks` (tuple of the ranks still running), `timeout` (seconds), `stacks` ({rank: Python stacks of its
    threads, innermost frame first}), `outputs` ({rank: tail of its stdout and stderr}).
    """

    def __init__(self, task: str, ranks: tuple[int, ...], timeout: float, stacks: dict[int, str], outputs: dict[int, str]):
        self.task, self.ranks, self.timeout, self.stacks, self.outputs = task, tuple(ranks), timeout, stacks, outputs
        super().__init__(self._text())

    def _text(self) -> str:
        names = ", ".join(map(str, self.ranks))
        text = (
            f"{self.task}: rank{'s' * (len(self.ranks) > 1)} {names} still running after {self.timeout:g} s; "
            "look at the stacks for the collective that a peer does not join, or give a longer timeout"
        )
        for rank in self.ranks:
            text += section(f"stack of rank {rank}", self.stacks.get(rank, ""))
            text += section(f"output of rank {rank} (tail)", self.outputs.get(rank, ""))
        return text

    def __reduce__(self):
        return type(self), (self.task, self.ranks, self.timeout, self.stacks, self.outputs)


def died(rank: int, code: int, output: str, world_size: int) -> RankError:
    """The error for a process that ended: `code` as in `subprocess.Popen.returncode` (negative: a signal)."""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = "unknown"
        how = f"died with signal {-code} ({name})"
    else:
        how = f"died with exit code {code}"
    return RankError(rank, "ProcessDied", how, "", output, world_size=world_size)


def section(title: str, body: str) -> str:
    """A titled block for the end of a message; nothing for an empty body."""
    return f"\n--- {title}\n{body.rstrip()}" if body.strip() else ""


def _rebuild_rank_error(args, world_size):
    return RankError(*args, world_size=world_size)
