"""Shared memory that programs leave behind: SGLang's server ends without unlinking a semaphore and a table of loads
in /dev/shm. In go live processes, out come the inodes they map; later the files with these inodes are removed.

Inodes, because glibc maps a semaphore under a temporary name (`sem.XXXXXX (deleted)`) before it links the final one."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from lab.runtime.procfs import Proc

FOLDER = Path("/dev/shm")  # noqa: S108 - the place itself, nothing is made there
NAMES = ("sem.mp-", "psm_", "sglang_", "sgl_shm_")  # Python's semaphores and shared memory, SGLang's own


def mapped(processes: Iterable[Proc]) -> frozenset[int]:
    """Inodes below /dev/shm that the processes have mapped; one that has ended maps nothing."""
    found = set()
    for process in processes:
        try:
            lines = Path(f"/proc/{process.pid}/maps").read_text(errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            if "/dev/shm/" in line:  # noqa: S108
                found.add(int(line.split(maxsplit=5)[4]))
    return frozenset(found)


def remove(inodes: Iterable[int]) -> tuple[str, ...]:
    """Unlink the files of this user in /dev/shm with these inodes and a name known to be a program's leftover."""
    wanted = set(inodes)
    removed = []
    for path in FOLDER.iterdir() if wanted and FOLDER.is_dir() else ():
        try:
            stat = path.lstat()
            if stat.st_ino in wanted and stat.st_uid == os.getuid() and path.name.startswith(NAMES):
                path.unlink()
                removed.append(path.name)
        except FileNotFoundError:
            continue
    return tuple(removed)
