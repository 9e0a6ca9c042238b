"""Which processes are ours, and ending them: in go a mark (the value of `LAB_RUN` in their environment) and
the leaders that were started, out come the processes of that family. Facts from proc(5): the start time in
`/proc/<pid>/stat` together with the pid names a process for as long as the machine is up; a pid alone does
not, because the kernel gives it out again. Nothing is ever chosen by its name."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

MARK = "LAB_RUN"
_LOOKS = 10
_POLL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Proc:
    """One line of `/proc/<pid>/stat`: `start` in clock ticks since boot, `state` as ps shows it."""

    pid: int
    ppid: int
    pgid: int
    sid: int
    start: int
    state: str

    @property
    def alive(self) -> bool:
        """False for a zombie: it has ended and only waits to be collected by its parent."""
        return self.state not in "ZXx"


def read_proc(pid: int) -> Proc | None:
    """The process of this pid now, or None."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes().decode("utf-8", errors="replace")
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name before it may hold spaces and brackets
    return Proc(
        pid=pid,
        state=fields[0],
        ppid=int(fields[1]),
        pgid=int(fields[2]),
        sid=int(fields[3]),
        start=int(fields[19]),
    )


def is_alive(pid: int, *, start: int) -> bool:
    """Whether the process with this pid and start time still runs."""
    proc = read_proc(pid)
    return proc is not None and proc.start == start and proc.alive


def family(mark: str, *, leaders: Iterable[tuple[int, int]]) -> tuple[Proc, ...]:
    """All live processes of ours: marked, in the session of a leader, or descended from one of these.

    `mark` also stands for every longer mark `mark/...`. `leaders` are (pid, start time); a leader's session
    counts only while the leader itself is in the process table (a zombie is enough), for after that its
    number may belong to a stranger. The caller itself and its ancestors are never among them.
    """
    procs, marked = _scan(mark)
    heads = {pid for pid, start in leaders if pid in procs and procs[pid].start == start}
    spared = _line_of(os.getpid(), procs=procs)
    ours = marked | heads | {pid for pid, proc in procs.items() if proc.sid in heads or proc.pgid in heads}
    ours -= spared
    added = ours
    while added:
        added = {pid for pid, proc in procs.items() if proc.ppid in added} - ours - spared
        ours = ours | added
    return tuple(procs[pid] for pid in sorted(ours) if procs[pid].alive)


def _scan(mark: str) -> tuple[dict[int, Proc], set[int]]:
    """The process table, and the pids in it that carry the mark.

    Looks again for pids that appeared meanwhile: a process that forks and ends while the table is read would
    otherwise be missed together with its child. A machine where others keep starting processes is no reason
    to look for ever.
    """
    procs: dict[int, Proc] = {}
    marked: set[int] = set()
    seen: set[int] = set()
    for _ in range(_LOOKS):
        new = set(psutil.pids()) - seen
        if not new:
            break
        seen |= new
        for pid in new:
            proc = read_proc(pid)
            if proc is not None:
                procs[pid] = proc
                if proc.alive and _has_mark(pid, mark):
                    marked.add(pid)
    return procs, marked


def _line_of(pid: int, *, procs: dict[int, Proc]) -> set[int]:
    line: set[int] = set()
    while pid in procs and pid not in line:
        line.add(pid)
        pid = procs[pid].ppid
    return line


def _has_mark(pid: int, mark: str) -> bool:
    try:
        environ = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # ended meanwhile, or another user's
        return False
    wanted = f"{MARK}={mark}".encode()
    return any(item == wanted or item.startswith(wanted + b"/") for item in environ.split(b"\0"))


def send_signal(proc: Proc, *, signum: signal.Signals) -> bool:
    """Signal exactly this process; False when it is gone, its pid is another's now, or it is another
    user's."""
    try:
        handle = os.pidfd_open(proc.pid)
    except ProcessLookupError:
        return False
    except (OSError, AttributeError):
        # no pidfd in this kernel or this build of Python: a check just before is the best there is
        return _send_by_pid(proc, signum=signum)
    try:
        if not is_alive(proc.pid, start=proc.start):
            return False
        signal.pidfd_send_signal(handle, signum)
    except (ProcessLookupError, PermissionError):
        return False
    finally:
        os.close(handle)
    return True


def _send_by_pid(proc: Proc, *, signum: signal.Signals) -> bool:
    if not is_alive(proc.pid, start=proc.start):
        return False
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(proc.pid, signum)
        return True
    return False


def end_all(
    find: Callable[[], tuple[Proc, ...]], *, settle_s: float, limit_s: float = 10.0
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """SIGKILL everything `find` returns until it twice returns nothing: (pids killed, pids left).

    Gives up on what is left after `limit_s` seconds. First waits up to `settle_s` seconds for them to end by
    themselves. Looks twice because a process can fork just behind a look and end just before it.
    """
    began = time.monotonic()
    killed: set[int] = set()
    empty = 0
    while True:
        found = find()
        empty = 0 if found else empty + 1
        waited = time.monotonic() - began
        if empty == 2 or waited > settle_s + limit_s:
            return tuple(sorted(killed)), tuple(proc.pid for proc in found)
        if waited >= settle_s:
            killed |= {proc.pid for proc in found if send_signal(proc, signum=signal.SIGKILL)}
        if found:
            time.sleep(_POLL_S)
