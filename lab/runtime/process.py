"""Programs as plain processes of this machine: in goes a `Command`, out come readiness, exit codes and a
`Stopped` record, or a `ProcessFault`. Each program leads its own session, carries a mark in its environment,
and stands in the ledger, so that whatever happens to it or to the lab none of its processes survives
(`docs/decisions/0004-process-runtime.md`)."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType, TracebackType

import httpx

from lab.errors import LabError
from lab.runtime import shm
from lab.runtime.base import (
    Command,
    DeadlinePassed,
    DiedUnderLoad,
    DiedWhileStarting,
    How,
    NeverReady,
    StartFailed,
    Stopped,
    Terminated,
    Waiting,
)
from lab.runtime.ledger import Ledger, Record
from lab.runtime.logtail import last_line
from lab.runtime.ports import describe, holder, loopback_port
from lab.runtime.procfs import end_all, family, read_proc, send_signal
from lab.runtime.started import Started, ending, exit_code, log_end, members, program_exists, spawn

Say = Callable[[Waiting], None]
_Handler = Callable[[int, FrameType | None], object] | int | None

_HEALTH_EVERY_S = 0.2
_HEALTH_ANSWER_S = 5.0  # some SGLang settings let /health generate a token first, which takes over a second
_SAY_EVERY_S = 0.5
_POLL_S = 0.02
_SETTLE_S = 2.0  # for helpers that end by themselves once the leader has (multiprocessing's resource tracker)
_EOF_S = 1.0  # for a program that ends when its standard input does
_BLAME_S = 2.0  # a client of a dying server often ends a moment before the server does
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
        self._handlers: list[tuple[signal.Signals, _Handler]] = []
        self._closing = False
        self._hurried_by: int | None = None

    # ---- the block

    def __enter__(self) -> ProcessRuntime:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("ProcessRuntime belongs in the main thread")
        self._record = self._ledger.open(run_id=self._run_id)
        if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:  # inherited; the kernel would drop exit codes
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for signum in _SIGNALS:
            if signal.getsignal(signum) not in (
                signal.SIG_IGN,
                None,
            ):  # nohup and background jobs keep their way
                self._handlers.append((signum, signal.signal(signum, self._on_signal)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        try:
            self._close()
        finally:
            for signum, handler in self._handlers:
                signal.signal(signum, handler)
        if error is None and self._hurried_by is not None:
            self._raise(self._hurried_by)  # asked to end while ending in order: the lab must still hear of it

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        if self._closing:
            self._hurried_by = signum
        else:
            self._raise(signum)

    @staticmethod
    def _raise(signum: int) -> None:
        raise KeyboardInterrupt if signum == signal.SIGINT else Terminated(signum)

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
            reason = f"no longer reads its input and {ending(process)}"
            raise DiedUnderLoad(
                reason, name=process.name, phase="load", last_lines=log_end(process)
            ) from error

    # ---- watching

    def wait_ready(self, process: Started, *, url: str, deadline_s: float, say: Say | None = None) -> float:
        """Wait until a GET of `url` answers 200; returns the seconds it took, to 0.2 s.

        Raises `DiedWhileStarting` as soon as the program ends, `NeverReady` after `deadline_s` seconds or
        when the answer comes from a process that is not this program's, `LabError` for a URL that is not on
        the loopback.
        """
        port = loopback_port(url)
        answer = "none"
        with httpx.Client(trust_env=False) as http:
            for elapsed in self._ticks(process, deadline_s=deadline_s, every_s=_HEALTH_EVERY_S, say=say):
                if exit_code(process) is not None:
                    self._died_while_starting(process)
                answer = _get(http, url, timeout_s=min(_HEALTH_ANSWER_S, deadline_s - elapsed))
                if answer == "HTTP 200":
                    self._check_answerer(process, port=port)
                    process.shared |= shm.mapped(members(process))
                    return elapsed
        reason = f"not ready after {deadline_s:g} s; last answer of {url}: {answer}"
        raise NeverReady(reason, name=process.name, phase="start", last_lines=log_end(process))

    def wait(
        self, process: Started, *, deadline_s: float, watch: Sequence[Started] = (), say: Say | None = None
    ) -> int:
        """Wait until the program ends; returns its exit code.

        Raises `DiedUnderLoad` when a program in `watch` ends first, or within two seconds after this one has
        failed; `DeadlinePassed` after `deadline_s` seconds.
        """
        for _ in self._ticks(process, deadline_s=deadline_s, every_s=_SAY_EVERY_S, say=say, watch=watch):
            code = exit_code(process)
            if code is not None and code != 0:
                self._first_ended(watch, within_s=_BLAME_S)
            for other in watch:
                if exit_code(other) is not None:
                    reason = f"{ending(other)} while {process.name} depended on it"
                    raise DiedUnderLoad(reason, name=other.name, phase="load", last_lines=log_end(other))
            if code is not None:
                return code
        reason = f"not done after {deadline_s:g} s"
        raise DeadlinePassed(reason, name=process.name, phase="load", last_lines=log_end(process))

    def _ticks(
        self,
        process: Started,
        *,
        deadline_s: float,
        every_s: float,
        say: Say | None,
        watch: Sequence[Started] = (),
    ) -> Iterator[float]:
        """Elapsed seconds, every `every_s` and at once when a program ends, until the deadline has passed."""
        began = time.monotonic()
        while (elapsed := time.monotonic() - began) < deadline_s:
            yield elapsed
            if say is not None:
                line = last_line(process.command.log)
                say(Waiting(name=process.name, elapsed_s=elapsed, deadline_s=deadline_s, last_line=line))
            left = deadline_s - (time.monotonic() - began)
            self._first_ended((process, *watch), within_s=min(every_s, max(0.0, left)))

    def _first_ended(self, processes: Sequence[Started], *, within_s: float) -> bool:
        until = time.monotonic() + within_s
        while True:
            if any(exit_code(process) is not None for process in processes):
                return True
            if not processes or time.monotonic() >= until or self._hurried_by is not None:
                return False
            time.sleep(_POLL_S)

    def _died_while_starting(self, process: Started) -> None:
        reason = f"{ending(process)} before it was ready"
        raise DiedWhileStarting(reason, name=process.name, phase="start", last_lines=log_end(process))

    def _check_answerer(self, process: Started, *, port: int) -> None:
        if exit_code(process) is not None:
            self._died_while_starting(process)
        pid = holder(port)
        if pid is not None and pid not in {proc.pid for proc in members(process)}:
            reason = f"port {port} is answered by {describe(pid)}, which is not part of it"
            raise NeverReady(reason, name=process.name, phase="start", last_lines=log_end(process))

    # ---- ending

    def stop(self, process: Started, *, grace_s: float = 20.0) -> Stopped:
        """End the program and everything it started; a second call returns the same record.

        Its standard input is closed first. SIGINT and then SIGTERM go to the leader alone, which knows the
        order in which its parts end, with `grace_s` seconds each; SIGKILL goes to all of its processes. Those
        that outlive the leader by two seconds are killed too.
        """
        if process.stopped is not None:
            return process.stopped
        began = time.monotonic()
        process.shared |= shm.mapped(members(process))
        how = self._ask_to_end(process, grace_s=grace_s)
        settle_s = 0.0 if how == "SIGKILL" or self._hurried_by is not None else _SETTLE_S
        killed, left = end_all(lambda: members(process), settle_s=settle_s)
        code = exit_code(process)
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

    def _ask_to_end(self, process: Started, *, grace_s: float) -> How:
        if exit_code(process) is not None:
            return "already"
        if process.popen.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.popen.stdin.close()
            if self._first_ended((process,), within_s=min(_EOF_S, grace_s)):
                return "EOF"
        polite: tuple[tuple[signal.Signals, How], ...] = (
            (signal.SIGINT, "SIGINT"),
            (signal.SIGTERM, "SIGTERM"),
        )
        for signum, how in polite:
            leader = read_proc(process.pid)
            if leader is not None:
                send_signal(leader, signum=signum)
            if self._first_ended((process,), within_s=grace_s):
                return how
        return "SIGKILL"


def _get(http: httpx.Client, url: str, *, timeout_s: float) -> str:
    try:
        return f"HTTP {http.get(url, timeout=timeout_s).status_code}"
    except httpx.HTTPError as error:
        return type(error).__name__
