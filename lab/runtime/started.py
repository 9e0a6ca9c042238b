"""One program started as a process: in goes a `Command`, out comes a `Started`, which answers what one can ask
about it: has it ended and how, which processes belong to it, what did it log last."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from lab.runtime.base import Command, Stopped
from lab.runtime.ledger import Child
from lab.runtime.logtail import last_lines
from lab.runtime.procfs import MARK, Proc, family, read_proc

_LAUNCHER = Path(__file__).with_name("launch.py")


@dataclass(eq=False, kw_only=True)
class Started:
    """A program that was started; only `ProcessRuntime` makes and changes it."""

    command: Command
    child: Child
    mark: str
    popen: subprocess.Popen[bytes] = field(repr=False)
    stopped: Stopped | None = None
    shared: frozenset[int] = frozenset()  # inodes of shared memory that its processes were seen to use

    @property
    def name(self) -> str:
        """The command's name."""
        return self.command.name

    @property
    def log(self) -> Path:
        """The command's log."""
        return self.command.log

    @property
    def pid(self) -> int:
        """The leader's pid, also the number of its process group and session."""
        return self.child.pid

    def exit_code(self) -> int | None:
        """The exit code, negative for a signal; None while the program runs.

        Looks without collecting the zombie (waitid(2), WNOWAIT): as long as it is there, its pid, group and
        session number cannot pass to a stranger, so they may still be trusted when the program is ended.
        """
        if self.popen.returncode is not None:
            return self.popen.returncode
        info = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if info is None:
            return None
        return info.si_status if info.si_code == os.CLD_EXITED else -info.si_status

    def ending(self) -> str:
        """How the program ended, in words."""
        code = self.exit_code()
        if code is None:
            return "still runs"
        if code >= 0:
            return f"ended with exit code {code}"
        # SGLang kills itself like this after a crash of one of its parts; the log's end tells which it was
        hint = (
            " (by its own clean-up after a crash, or by the kernel out of memory)"
            if code == -signal.SIGKILL
            else ""
        )
        return f"was ended by {signal.Signals(-code).name}{hint}"

    def members(self) -> tuple[Proc, ...]:
        """The program's live processes, its own and those that it started."""
        return family(self.mark, leaders=((self.child.pid, self.child.start),))

    def log_end(self) -> tuple[str, ...]:
        """The last lines of its log."""
        return last_lines(self.command.log)


def spawn(command: Command, *, mark: str) -> Started:
    """Start the program as the leader of a session of its own, with `mark` in its environment."""
    cpus = ",".join(map(str, command.cpus)) or "-"
    mems = ",".join(map(str, command.mems)) or "-"
    # setproctitle, which SGLang uses, wipes /proc/<pid>/environ and our mark with it, unless SPT_NOENV is set
    env = dict(command.env) | {MARK: mark, "SPT_NOENV": "1"}
    with command.log.open("ab") as log:
        popen = subprocess.Popen(  # noqa: S603 - the plan's own argv, no shell
            [sys.executable, "-I", "-S", str(_LAUNCHER), str(os.getpid()), cpus, mems, *command.argv],
            stdin=subprocess.PIPE if command.stdin else subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=command.cwd,
            env=env,
            start_new_session=True,
        )
    proc = read_proc(popen.pid)
    child = Child(name=command.name, pid=popen.pid, start=proc.start if proc else 0)
    return Started(command=command, child=child, mark=mark, popen=popen)


def program_exists(command: Command) -> bool:
    """Whether `argv[0]` names a program, found as the launcher will look for it."""
    program = command.argv[0]
    if "/" in program:
        return os.access(command.cwd / program, os.X_OK)
    return shutil.which(program, path=dict(command.env).get("PATH", os.defpath)) is not None
