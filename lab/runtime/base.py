"""What every runtime takes and gives: a `Command` goes in, a `Stopped` comes out when it has ended, and a
`ProcessFault` is raised when it does not do what was asked. A fault is a result of a trial (it is written in
the trial's `status.json`), so it is neither a `LabError` nor a bug."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

Phase = Literal["start", "load"]
How = Literal["already", "EOF", "SIGINT", "SIGTERM", "SIGKILL"]


@dataclass(frozen=True, kw_only=True)
class Command:
    """One program to start, fully resolved.

    `env` is the whole environment: nothing of the lab's own is inherited. `argv[0]` is looked up in its
    `PATH`, or from `cwd` when it has a slash. `cpus` are CPU numbers and `mems` NUMA nodes, empty for "all";
    `gpus` are UUIDs. `port` is the one it listens on, as it sees it, 0 for none;
    `profiler` is what watches it, if anything (container.PROFILER_CAPABILITIES). `stdin` opens a pipe
    for `send_line`; without it the program reads `/dev/null`. Standard output and error are appended to `log`
    unchanged. In a container it may write to `cwd` and to the log's folder, and to nothing else that lasts.
    """

    name: str
    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    cwd: Path
    log: Path
    cpus: tuple[int, ...] = ()
    mems: tuple[int, ...] = ()
    gpus: tuple[str, ...] = ()
    port: int = 0
    profiler: str = ""
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


class Program(Protocol):
    """A program that a runtime has started."""

    @property
    def name(self) -> str:
        """The command's name: server, client."""

    @property
    def log(self) -> Path:
        """The file its output goes to."""

    def exit_code(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""

    def ending(self) -> str:
        """How it ended, in words."""

    def log_end(self) -> tuple[str, ...]:
        """The last lines of its log."""


class Runtime(Protocol):
    """What `execute` needs of a runtime: a `with` block in which programs are started, watched and stopped."""

    def __enter__(self) -> Runtime:
        """Begin."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End everything that was started."""

    def values(self, *, trial: Path, scratch: Path, port: int) -> dict[str, str]:
        """TRIAL, SCRATCH and PORT as the programs of a trial see them; `port` 0 asks for a free one."""

    def start(self, command: Command) -> Program:
        """Start a program and return at once."""

    def port_of(self, program: Program) -> int:
        """The port of this machine's loopback that leads to the program."""

    def wait_ready(
        self,
        program: Program,
        *,
        url: str,
        deadline_s: float,
        say: Callable[[Waiting], None] | None = None,
    ) -> float:
        """Wait until a GET of `url` answers 200; returns the seconds it took."""

    def stop(self, program: Program, *, grace_s: float = 20.0) -> Stopped:
        """End a program and everything it started."""
