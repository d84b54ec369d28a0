"""From what pytest saw of a case to its verdict and its row in the results: known failures, diagnosis, shrinking."""

from __future__ import annotations

import shlex
from typing import Any

from . import known
from .api import LawBroken, NotRun, Verdict


def verdict_of(error: BaseException | None) -> tuple[Verdict, str]:
    """An outcome as verdict and message: only a broken law is a FAIL, any other exception is UNKNOWN (NotRun: NOT_RUN)."""
    if error is None:
        return Verdict.PASS, ""
    if isinstance(error, LawBroken):
        return Verdict.FAIL, str(error)
    if isinstance(error, NotRun):
        return Verdict.NOT_RUN, f"not-run({error})"
    return Verdict.UNKNOWN, f"{type(error).__name__}: {error}"


def row_of(case, error: BaseException | None, seconds: float, lab, entry: known.Known | None) -> dict[str, Any]:
    """The row of one case, JSON-able."""
    verdict, message = verdict_of(error)
    verdict, note = known.judge(entry, verdict, message, case.check)
    row = {"id": case.id, "family": case.family, "toy": str(case.toy), "plan": case.plan, "dtype": case.dtype}
    row |= {"direction": case.direction, "check": case.check, "verdict": str(verdict), "seconds": round(seconds, 3)}
    row |= {"message": "; ".join(filter(None, (message, note))), "error": lab and lab.error}
    if verdict is Verdict.FAIL and error is not None:
        row["fingerprint"] = known.fingerprint(case.check, message)
    if verdict is Verdict.KNOWN:
        row["known"] = {"reason": entry.reason, "issue": entry.issue, "expires": entry.expires.isoformat()}
    return row


class Investigator:
    """Looks closer at failures, a few of each kind: the first `limit` of every (family, check)."""

    def __init__(self, *, shrink: bool, limit: int = 2):
        self.shrink, self.limit = shrink, limit
        self.seen: dict[tuple[str, str], int] = {}

    def look(self, lab, case, row: dict[str, Any]) -> None:
        """Add ``diagnosis`` (sentences) and ``smaller`` (the id of a smaller failing case) to a failed case's row."""
        key = case.family, case.check
        self.seen[key] = self.seen.get(key, 0) + 1
        if row["verdict"] != "fail" or self.seen[key] > self.limit:
            return
        from .diagnose import diagnose
        from .shrink import smaller

        if found := diagnose(lab, case):
            row["diagnosis"] = found
        if self.shrink and (less := smaller(lab, case)):
            row["smaller"] = less


def text_of(row: dict[str, Any], bridge: str) -> str:
    """A case that did not pass, for a terminal: message, diagnosis, and the command that runs it again."""
    command = "pytest conformance" + ("" if bridge == "reference" else f" --bridge {shlex.quote(bridge)}")
    lines = [row["message"], *(f"  - {sentence}" for sentence in row.get("diagnosis", ()))]
    if smaller := row.get("smaller"):
        lines.append(f"  smaller: {command} --case {smaller}")
    lines.append(f"  again:   {command} --case {row['id']}")
    if "fingerprint" in row:
        lines.append(f"  fingerprint for a list of known failures: {row['fingerprint']}")
    return "\n".join(lines)
