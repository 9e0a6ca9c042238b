"""Programs as plain processes of this machine: in goes a `Command`, out come readiness, exit codes and a
`Stopped` record, or a `ProcessFault`. Each program leads its own session, carries a mark in its environment,
and stands in the ledger, so that whatever happens to it or to the lab none of its processes survives
(`docs/decisions/0004-process-runtime.md`)."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from lab.errors import LabError
from lab.runtime import shm
from lab.runtime.base import (
    Command,
    DeadlinePassed,
    DiedUnderLoad,
    How,
    NeverReady,
    Program,
    StartFailed,
    Stopped,
)
from lab.runtime.interrupt import Interrupts
from lab.runtime.ledger import Ledger, Record
from lab.runtime.ports import describe, free_port, holder, loopback_port, require_port
from lab.runtime.procfs import end_all, family, read_proc, send_signal
from lab.runtime.started import Started, program_exists, spawn
from lab.runtime.waiting import Say, died_while_starting, first_ended, ticks, until_ready

_SAY_EVERY_S = 0.5
_SETTLE_S = 2.0  # for helpers that end by themselves once the leader has (multiprocessing's resource tracker)
_EOF_S = 1.0  # for a program that ends when its standard input does
_BLAME_S = 2.0  # a client of a dying server often ends a moment before the server does


class ProcessRuntime:
    """Starts programs, watches them and ends them all when its `with` block is left.

    Use it in the main thread: signals are handled there, and the kernel ends a program whose starting thread
    ends. Ctrl-C, SIGTERM and SIGHUP leave the block by an exception (`KeyboardInterrupt`, for the other two
    its subclass `Terminated`); a further one while the block is being left cuts the grace period short.
    """

    def __init__(self, *, ledger: Ledger, run_id: str, close_grace_s: float = 10.0) -> None:
        self._ledger = ledger
        self._run_id = run_id
        self._close_grace_s = close_grace_s
        self._record: Record | None = None
        self._started: list[Started] = []
        self._interrupts = Interrupts()

    # ---- the block

    def __enter__(self) -> ProcessRuntime:
        self._interrupts.begin()
        self._record = self._ledger.open(run_id=self._run_id)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._interrupts.closing()
        try:
            self._close()
        finally:
            self._interrupts.end(error=error)

    def _close(self) -> None:
        record = self._open_record()
        left: tuple[int, ...] = ()
        try:
            for process in reversed(self._started):
                self.stop(process, grace_s=self._close_grace_s)
        finally:
            # also what was started but not yet noted when the exception came
            leaders = tuple((p.child.pid, p.child.start) for p in self._started if p.stopped is None)
            _, left = end_all(lambda: family(record.mark, leaders=leaders), settle_s=0.0)
        if not left:
            record.close()

    def _open_record(self) -> Record:
        if self._record is None:
            raise RuntimeError("use ProcessRuntime in a `with` block")
        return self._record

    # ---- starting

    def values(self, *, trial: Path, scratch: Path, port: int) -> dict[str, str]:
        """What the plan's placeholders are for a trial: its folders as they are, and a port that is free.

        Raises `LabError` when `port` is given (not 0) and taken.
        """
        if port:
            require_port(port)
        return {"TRIAL": str(trial), "SCRATCH": str(scratch), "PORT": str(port or free_port())}

    def port_of(self, program: Program) -> int:
        """The port of this machine's loopback on which the program listens: the one it was told."""
        return _mine(program).command.port

    def start(self, command: Command) -> Started:
        """Start the program and return at once; raises `StartFailed` when there is no such program."""
        record = self._open_record()
        if not program_exists(command):
            raise StartFailed(f"no program {command.argv[0]!r} to start", name=command.name, phase="start")
        mark = f"{record.mark}/{len(self._started)}-{command.name}"
        process = spawn(command, mark=mark)
        self._started.append(process)
        record.add(process.child)
        return process

    def send_line(self, process: Started, line: str) -> None:
        """Write a line to the program's standard input; `DiedUnderLoad` when nobody reads it any more."""
        pipe = process.popen.stdin
        if pipe is None:
            raise RuntimeError(f"{process.name} was started without stdin")
        try:
            pipe.write(line.encode() + b"\n")
            pipe.flush()
        except (BrokenPipeError, ValueError) as error:
            reason = f"no longer reads its input and {process.ending()}"
            raise DiedUnderLoad(
                reason, name=process.name, phase="load", last_lines=process.log_end()
            ) from error

    # ---- watching

    def wait_ready(self, program: Program, *, url: str, deadline_s: float, say: Say | None = None) -> float:
        """Wait until a GET of `url` answers 200; returns the seconds it took, to 0.2 s.

        Raises `DiedWhileStarting` as soon as the program ends, `NeverReady` after `deadline_s` seconds or
        when the answer comes from a process that is not this program's, `LabError` for a URL that is not on
        the loopback.
        """
        process = _mine(program)
        port = loopback_port(url)
        hurried = lambda: self._interrupts.hurried  # noqa: E731
        elapsed = until_ready(process, url=url, deadline_s=deadline_s, say=say, hurried=hurried)
        self._check_answerer(process, port=port)
        process.shared |= shm.mapped(process.members())
        return elapsed

    def wait(
        self, process: Started, *, deadline_s: float, watch: Sequence[Started] = (), say: Say | None = None
    ) -> int:
        """Wait until the program ends; returns its exit code.

        Raises `DiedUnderLoad` when a program in `watch` ends first, or within two seconds after this one has
        failed; `DeadlinePassed` after `deadline_s` seconds.
        """
        for _ in ticks((process, *watch), deadline_s=deadline_s, every_s=_SAY_EVERY_S, say=say):
            code = process.exit_code()
            if code is not None and code != 0:
                first_ended(watch, within_s=_BLAME_S)
            for other in watch:
                if other.exit_code() is not None:
                    reason = f"{other.ending()} while {process.name} depended on it"
                    raise DiedUnderLoad(reason, name=other.name, phase="load", last_lines=other.log_end())
            if code is not None:
                return code
        reason = f"not done after {deadline_s:g} s"
        raise DeadlinePassed(reason, name=process.name, phase="load", last_lines=process.log_end())

    def _check_answerer(self, process: Started, *, port: int) -> None:
        if process.exit_code() is not None:
            raise died_while_starting(process)
        pid = holder(port)
        if pid is not None and pid not in {proc.pid for proc in process.members()}:
            reason = f"port {port} is answered by {describe(pid)}, which is not part of it"
            raise NeverReady(reason, name=process.name, phase="start", last_lines=process.log_end())

    # ---- ending

    def stop(self, program: Program, *, grace_s: float = 20.0) -> Stopped:
        """End the program and everything it started; a second call returns the same record.

        Its standard input is closed first. SIGINT and then SIGTERM go to the leader alone, which knows the
        order in which its parts end, with `grace_s` seconds each; SIGKILL goes to all of its processes. Those
        that outlive the leader by two seconds are killed too.
        """
        process = _mine(program)
        if process.stopped is not None:
            return process.stopped
        began = time.monotonic()
        process.shared |= shm.mapped(process.members())
        how = self._ask_to_end(process, grace_s=grace_s)
        settle_s = 0.0 if how == "SIGKILL" or self._interrupts.hurried else _SETTLE_S
        killed, left = end_all(process.members, settle_s=settle_s)
        code = process.exit_code()
        if code is not None:
            process.popen.wait()  # only now may the pid pass to another process
        process.stopped = Stopped(
            name=process.name,
            how=how,
            seconds=time.monotonic() - began,
            exit_code=code,
            survivors_killed=tuple(pid for pid in killed if pid != process.pid),
            left=left,
        )
        if not left:
            shm.remove(process.shared)
            with contextlib.suppress(
                LabError
            ):  # a full disk: a stale line does no harm, its start time tells
                self._open_record().remove(process.child)
        return process.stopped

    def _ends(self, processes: Sequence[Started], *, within_s: float) -> bool:
        return first_ended(processes, within_s=within_s, hurried=lambda: self._interrupts.hurried)

    def _ask_to_end(self, process: Started, *, grace_s: float) -> How:
        if process.exit_code() is not None:
            return "already"
        if process.popen.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.popen.stdin.close()
            if self._ends((process,), within_s=min(_EOF_S, grace_s)):
                return "EOF"
        polite: tuple[tuple[signal.Signals, How], ...] = (
            (signal.SIGINT, "SIGINT"),
            (signal.SIGTERM, "SIGTERM"),
        )
        for signum, how in polite:
            leader = read_proc(process.pid)
            if leader is not None:
                send_signal(leader, signum=signum)
            if self._ends((process,), within_s=grace_s):
                return how
        return "SIGKILL"


def _mine(program: Program) -> Started:
    if not isinstance(program, Started):
        raise TypeError(f"{program.name} was not started by this runtime")
    return program
