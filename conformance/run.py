"""The suite as a function: for scripts, notebooks and other test tools."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .api import Adapter, Verdict
from .naming import name_of
from .worlds.interpreter import command

_SUITE = __name__.rpartition(".")[0]


@dataclass(frozen=True)
class Result:
    """What a run came to.

    rows: one dict a case, as in results.jsonl (id, verdict, message, seconds, ...). header: the bridge, versions and what ranks ran on.
    reports: kind -> file. output: what pytest wrote.
    """

    rows: list[dict[str, Any]]
    header: dict[str, Any]
    reports: dict[str, Path]
    exit_code: int
    output: str = field(repr=False)

    @property
    def ok(self) -> bool:
        """Whether every case passed, is known or was not run, and the run itself came to its end."""
        return self.exit_code == 0 and not self.bad

    @property
    def bad(self) -> list[dict[str, Any]]:
        """The rows that failed or came to no verdict."""
        return [row for row in self.rows if row["verdict"] in (str(Verdict.FAIL), str(Verdict.UNKNOWN))]

    @property
    def counts(self) -> dict[str, int]:
        """Verdict -> number of cases."""
        return {str(v): sum(row["verdict"] == str(v) for row in self.rows) for v in Verdict}

    def __str__(self) -> str:
        from .report import matrix

        return matrix(self.rows, header=self.header)


def run_conformance(
    adapter: Adapter | str,
    *,
    families: str | Iterable[str] = (),
    toys: str | Iterable[str] = (),
    plans: str | Iterable[str] = (),
    checks: str | Iterable[str] = (),
    cases: str | Iterable[str] = (),
    known: str | Path | Iterable[str | Path] = (),
    profile: str = "default",
    report_dir: str | Path = "reports",
    workers: int = 1,
    verbose: bool = False,
    timeout: float | None = None,
) -> Result:
    """Run the suite on an adapter and give the verdicts; the reports go to `report_dir`.

    adapter: a name as for ``--bridge``, or an adapter that a module holds in a variable. families, toys, plans, checks, cases: as the
    options of these names, one word or several; none means all. workers: processes with ranks of their own (pytest-xdist). verbose: show
    progress on stdout. timeout: seconds for the whole run.

    Runs in a process of its own, in the current folder, so it may be called from anywhere, also from a test. Raises ValueError when an
    option names nothing or the adapter cannot be loaded, TimeoutError when time is over, RuntimeError when the run ends before its report.
    """
    name, folder = name_of(adapter), Path(report_dir).resolve()
    (folder / "results.jsonl").unlink(missing_ok=True)
    options = {"family": families, "toy": toys, "plan": plans, "check": checks, "case": cases, "known": known}
    words = [f"--{option}={word}" for option, value in options.items() for word in _several(value)]
    words += [
        f"--bridge={name}",
        f"--profile={profile}",
        f"--report-dir={folder}",
        *(["-n", str(workers)] if workers > 1 else []),
    ]
    code, output = _run(words, verbose, timeout)
    return _result(name, folder, code, output)


def _several(value: str | Path | Iterable) -> list[str]:
    return [str(value)] if isinstance(value, (str, Path)) else [str(word) for word in value]


def pytest_process(*words: str) -> None:
    """Entry point of the run's process. The caller's pytest settings are not the suite's."""
    import pytest

    plain = ["-o", "addopts=", "--import-mode=importlib", "-p", "no:cacheprovider", "-q", "--rootdir", os.getcwd()]
    sys.exit(pytest.main([*plain, "--pyargs", _SUITE, *words]))


def _run(words: list[str], verbose: bool, timeout: float | None) -> tuple[int, str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    process = subprocess.Popen(
        command(None, f"{__name__}:pytest_process", *words),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    )
    with process, _Alarm(process, timeout) as alarm:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if verbose:
                print(line, end="", flush=True)
    if alarm.rang:
        raise TimeoutError(
            f"the suite had not finished after {timeout:g} s; narrow it, or give more time\n{''.join(lines)[-2000:]}"
        )
    return process.returncode, "".join(lines)


class _Alarm:
    """Ends a process's whole group when time is over, and when the block is left early."""

    def __init__(self, process: subprocess.Popen, seconds: float | None):
        import threading

        self.process, self.rang = process, False
        self.timer = threading.Timer(seconds, self._ring) if seconds is not None else None

    def _ring(self) -> None:
        self.rang = True
        self._end()

    def _end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def __enter__(self) -> _Alarm:
        if self.timer:
            self.timer.start()
        return self

    def __exit__(self, kind, *rest) -> None:
        if self.timer:
            self.timer.cancel()
        if kind is not None:
            self._end()


def _result(name: str, folder: Path, code: int, output: str) -> Result:
    from .report import read

    file = folder / "results.jsonl"
    if not file.exists():
        problem = ValueError if code in (4, 5) else RuntimeError  # pytest: usage error, nothing collected
        raise problem(f"the suite on {name} ended with code {code} before any verdict:\n{output[-4000:]}")
    run = read(file)
    reports = {kind: path for kind, path in _reports(folder).items() if path.exists()}
    return Result(list(run.cases), dict(run.header), reports, code, output)


def _reports(folder: Path) -> Mapping[str, Path]:
    files = {"results": "results.jsonl", "report": "report.html", "junit": "junit.xml", "summary": "summary.md"}
    return {kind: folder / file for kind, file in files.items()}
