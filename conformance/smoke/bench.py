"""What the steps share: the adapter, a toy, ranks, and how an outcome is come to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..api import Adapter, NotRun, offers
from ..cases import Toy
from ..lab import Lab
from ..worlds import RankError, RankTimeout

_TASKS = "shardproof.conformance.smoke.tasks"


class Wrong(Exception):
    """A step's finding: what is wrong, and what the protocol wants."""

    def __init__(self, problem: str, wanted: str):
        self.problem, self.wanted = problem, wanted
        super().__init__(f"{problem}. {wanted}")


@dataclass(frozen=True)
class Step:
    """One thing that the protocol promises. needs: steps that must have gone well; members: what the adapter must offer for it."""

    name: str
    run: Callable[[Bench], str]
    needs: tuple[str, ...] = ()
    members: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """A step's outcome. result: ok, wrong, skipped or not offered; detail: what was seen; todo: what the protocol wants."""

    step: str
    result: str
    detail: str = ""
    todo: str = ""
    trace: str = ""


class Bench:
    """An adapter under smoke; a context manager. Attributes are set by the steps that find them: `adapter`, `lab`, `toy`, `facts`."""

    def __init__(self, bridge: str, *, family: str | None = None, toy: str | None = None):
        self.bridge, self.asked_family, self.asked_toy = bridge, family, toy
        self.adapter: Adapter | None = None
        self.toy: Toy | None = None
        self.taken: dict[str, list[str]] = {}  # family -> variants
        self.facts: dict[str, Any] = {}
        self.good: set[str] = set()
        self._lab: Lab | None = None

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exc) -> None:
        if self._lab is not None:
            self._lab.close()

    @property
    def lab(self) -> Lab:
        """The worlds, started when first asked for."""
        if self._lab is None:
            self._lab = Lab(self.adapter, self.bridge)
        return self._lab

    def take(self, step: Step) -> Outcome:
        """Go through one step."""
        if missing := [name for name in step.needs if name not in self.good]:
            return Outcome(step.name, "skipped", f"needs {missing[0]}")
        if self.adapter is not None and not offers(self.adapter, step.members):
            return Outcome(step.name, "not offered", "checks that need it are not claimed (-)")
        try:
            detail = step.run(self)
        except Wrong as wrong:
            return Outcome(step.name, "wrong", wrong.problem, wrong.wanted, getattr(wrong.__cause__, "traceback_text", ""))
        except NotRun as lacking:
            return Outcome(step.name, "skipped", f"this machine lacks {lacking}")
        self.good.add(step.name)
        return Outcome(step.name, "ok", detail)

    # --------------------------------------------------------------------------------------------------------------- calls
    def call(self, member: str, *args: Any) -> Any:
        """Call a test-process method; what it raises is Wrong."""
        try:
            return getattr(self.adapter, member)(*args)
        except NotRun:
            raise
        except Exception as error:
            raise Wrong(f"{member} raised {_short(error)}", _CALLS.get(member, "It must answer, not raise")) from error

    def ranks(self, task: str, plan: str, **kwargs: Any) -> list:
        """Run a smoke task on every rank of a plan; a rank that fails is Wrong."""
        try:
            return self.lab.rank_task(f"{_TASKS}:{task}", plan, **kwargs)
        except RankError as error:
            advice = (
                "Ranks import the adapter afresh and call no test-process method before: "
                "whatever a rank method needs it must make itself, from its arguments"
            )
            raise Wrong(f"{task} under {plan}, rank {error.rank}: {error.type_name}: {_line(error.message)}", advice) from error
        except RankTimeout as error:
            waiting = "All ranks must make the same collective calls; the stacks below say where they wait"
            raise Wrong(f"{task} under {plan}: ranks {list(error.ranks)} do not finish", waiting) from error

    def folder(self, seed: int = 0) -> Path:
        """The toy's folder; another seed is the same model with other weights."""
        self.lab.seed = seed
        return self.lab.folder(self.toy)


_CALLS = {
    "family_of": "family_of takes any config.json, also of models unknown to the bridge: return None for those",
    "possible": "possible returns None, or the reason as a sentence: it raises nothing",
}


def digest_of(folder: Path) -> str:
    """A digest of a folder's files."""
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()


def _short(error: BaseException) -> str:
    name = getattr(error, "type_name", type(error).__name__)
    return f"{name}: {_line(getattr(error, 'message', None) or str(error))}"


def _line(text: str) -> str:
    return next((line for line in text.strip().splitlines() if line.strip()), "")[:300]
