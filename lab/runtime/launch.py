"""The few steps between the lab and a program it starts, run as a script of its own: pin to CPUs, ask the
kernel for SIGKILL when the lab dies, put signal handling back to normal, then become the program. Arguments:
the lab's pid, CPU numbers and NUMA nodes joined by commas (or `-`), then the program's argv. Imports nothing of the lab and
adds nothing to the environment. Exit 126 or 127, as shells do, when the program cannot be started; the reason
goes to its log."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SET_MEMPOLICY = 238  # the call's number on x86-64, the only processor that stacks are built for
_MPOL_BIND = 2  # linux/mempolicy.h


def _refuse(reason: str, *, code: int) -> NoReturn:
    print(f"lab: {reason}", file=sys.stderr, flush=True)
    os._exit(code)


def _environment() -> dict[bytes, bytes]:
    # Python may add LC_CTYPE to its own environment (PEP 538), so take what the kernel was given.
    items = (item.partition(b"=") for item in Path("/proc/self/environ").read_bytes().split(b"\0"))
    return {name: value for name, _, value in items if name}


def _die_with(lab_pid: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != lab_pid:  # the lab died before the kernel knew of our wish
        _refuse("the lab is gone", code=126)


def _bind_memory(nodes: list[int]) -> None:
    mask = ctypes.c_ulong(sum(1 << node for node in nodes))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_SET_MEMPOLICY, _MPOL_BIND, ctypes.byref(mask), 8 * ctypes.sizeof(mask)) != 0:
        reason = os.strerror(ctypes.get_errno())  # EPERM in containers, whose seccomp profile forbids it
        _refuse(
            f"cannot bind memory to NUMA nodes {nodes}: {reason}; take server_mems out of the site", code=126
        )


def _normal_signals() -> None:
    # exec keeps "ignored": Python ignores SIGPIPE, and a shell's background job ignores SIGINT.
    for name in ("SIGINT", "SIGTERM", "SIGQUIT", "SIGHUP", "SIGPIPE", "SIGXFSZ", "SIGCHLD"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def main(arguments: list[str]) -> NoReturn:
    """Become the program named by `arguments`; never returns."""
    lab_pid, cpus, mems, argv = int(arguments[0]), arguments[1], arguments[2], arguments[3:]
    _die_with(lab_pid)
    if mems != "-":
        _bind_memory([int(node) for node in mems.split(",")])
    if cpus != "-":
        try:
            os.sched_setaffinity(0, {int(cpu) for cpu in cpus.split(",")})
        except OSError as error:
            _refuse(f"cannot pin to CPUs {cpus}: {error.strerror}", code=126)
    _normal_signals()
    try:
        os.execvpe(argv[0], argv, _environment())  # noqa: S606 - starting a program without a shell is the point
    except OSError as error:
        _refuse(f"cannot start {argv[0]}: {error.strerror}", code=127)


if __name__ == "__main__":
    main(sys.argv[1:])
