"""What every runtime takes and gives: a `Command` goes in, a `Stopped` comes out when it has ended, and a
`ProcessFault` is raised when it does not do what was asked. A fault is a result of a trial (it is written in
the trial's `status.json`), so it is neither a `LabError` nor a bug."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Phase = Literal["start", "load"]
How = Literal["already", "EOF", "SIGINT", "SIGTERM", "SIGKILL"]


@dataclass(frozen=True, kw_only=True)
class Command:
    """One program to start, fully resolved.

    `env` is the whole environment: nothing of the lab's own is inherited. `argv[0]` is looked up in its
    `PATH`, or from `cwd` when it has a slash. `cpus` are CPU numbers, empty for "all". `stdin` opens a pipe
    for `send_line`; without it the program reads `/dev/null`. Standard output and error are appended to `log`
    unchanged.
    """

    name: str
    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    cwd: Path
    log: Path
    cpus: tuple[int, ...] = ()
    stdin: bool = False


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Where a wait stands, for a progress display; times in seconds, `last_line` of the program's log."""

    name: str
    elapsed_s: float
    deadline_s: float
    last_line: str


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """How a program ended.

    `how` names the signal that ended it ("already": none was needed; "EOF": closing its standard input did).
    `seconds` from the first signal until nothing of it was left. `exit_code` is negative for a signal, as in
    `subprocess`. `survivors_killed` are the other processes of this program that had to be killed, `left`
    those that even SIGKILL did not end in time.
    """

    name: str
    how: How
    seconds: float
    exit_code: int | None
    survivors_killed: tuple[int, ...] = ()
    left: tuple[int, ...] = ()


class ProcessFault(Exception):  # noqa: N818 - a result that is reported, not an error of the lab
    """A program did not do what was asked: in which phase, why, and the last lines of its log."""

    def __init__(self, reason: str, *, name: str, phase: Phase, last_lines: tuple[str, ...] = ()) -> None:
        super().__init__(reason)
        self.reason = reason
        self.name = name
        self.phase = phase
        self.last_lines = last_lines

    def __str__(self) -> str:
        return "\n".join([f"{self.name}: {self.reason}", *(f"  | {line}" for line in self.last_lines)])


class StartFailed(ProcessFault):
    """A program could not be brought to the point where it can be used."""


class DiedWhileStarting(StartFailed):
    """It ended before it was ready."""


class NeverReady(StartFailed):
    """It runs, but was not ready by the deadline."""


class DiedUnderLoad(ProcessFault):
    """A program that others depend on ended while they were at work."""


class DeadlinePassed(ProcessFault):
    """The work was not done by its deadline."""


class Terminated(KeyboardInterrupt):
    """The lab was asked to end by SIGTERM or SIGHUP: handled like Ctrl-C, `signum` tells which it was."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"signal {signum}")
        self.signum = signum
