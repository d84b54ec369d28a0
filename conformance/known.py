"""Known failures: a TOML list of exact case ids, each with a reason, an issue and an expiry; anything else still fails.

::

    [[known]]
    id = "qwen3/Qwen3-8B/tp2/fp32/import/forward.logits"
    fingerprint = "3f0c9a51be77"     # of the message, numbers aside; a failing case prints it
    reason = "why this is not mended yet"
    issue = "where it is followed"
    expires = 2026-12-31
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path

from .api import Verdict

_VOLATILE = re.compile(r"0x[0-9a-f]+|(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?|/\S+/")  # addresses, numbers, folders


@dataclass(frozen=True)
class Known:
    """One listed failure; the fields of its TOML table."""

    id: str
    fingerprint: str
    reason: str
    issue: str
    expires: date


def fingerprint(check: str, message: str) -> str:
    """12 hex digits of a failure's cause: the check and the first line of its message without numbers, addresses and folders."""
    line = message.strip().splitlines()[0] if message.strip() else ""
    return hashlib.sha256(f"{check}: {_VOLATILE.sub('#', line)}".encode()).hexdigest()[:12]


def load(paths: Iterable[str | Path]) -> dict[str, Known]:
    """Known failures by case id. Raises ValueError naming the file, the entry and what is wrong with it."""
    found: dict[str, Known] = {}
    for path in map(Path, paths):
        try:
            entries = tomllib.loads(path.read_text()).get("known", [])
        except (OSError, tomllib.TOMLDecodeError) as bad:
            raise ValueError(f"known failures {path}: {bad}") from None
        for entry in entries:
            one = _entry(path, entry)
            if one.id in found:
                raise ValueError(f"known failures {path}: {one.id} is listed twice")
            found[one.id] = one
    return found


def _entry(path: Path, entry: dict) -> Known:
    wanted = {f.name for f in fields(Known)}
    if wrong := sorted(wanted ^ set(entry)):
        raise ValueError(
            f"known failures {path}, entry {entry.get('id', '?')!r}: fields must be {sorted(wanted)}; look at {wrong}"
        )
    if not isinstance(entry["expires"], date):
        raise ValueError(f"known failures {path}, entry {entry['id']!r}: expires must be a TOML date like 2026-12-31")
    return Known(**entry)


def judge(entry: Known | None, verdict: Verdict, message: str, check: str, *, today: date | None = None) -> tuple[Verdict, str]:
    """The verdict that stands and a sentence about the list (empty where the list has no say).

    Only a FAIL with the listed fingerprint before the expiry becomes KNOWN; a listed case that passes is a FAIL, so that the list
    shrinks. A crash stays UNKNOWN.
    """
    if entry is None or verdict in (Verdict.UNKNOWN, Verdict.NOT_RUN):
        return verdict, ""
    if verdict is Verdict.PASS:
        return Verdict.FAIL, f"listed as a known failure ({entry.reason}) and passes: remove the entry"
    if (now := fingerprint(check, message)) != entry.fingerprint:
        return verdict, f"listed as a known failure with fingerprint {entry.fingerprint}; this failure has another cause, {now}"
    if (today or date.today()) > entry.expires:
        return verdict, f"was a known failure until {entry.expires} ({entry.reason}; {entry.issue}): mend it or renew the entry"
    return Verdict.KNOWN, f"{entry.reason}; {entry.issue}; until {entry.expires}"
