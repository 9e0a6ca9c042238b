"""Which lab something belongs to, in a form that outlives the lab: written into ledger files and container labels,
and read back to tell whether that lab is dead."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lab.runtime.procfs import is_alive, read_proc


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A lab's process, and where its pid and start time (ticks since boot) mean something."""

    pid: int
    start: int
    host: str
    boot: str
    pid_namespace: str

    def label(self) -> str:
        """As one word, for a container's label."""
        return "/".join((str(self.pid), str(self.start), self.boot, self.pid_namespace, self.host))


def me() -> Owner:
    """This process."""
    proc = read_proc(os.getpid())
    host, boot, pid_namespace = place()
    return Owner(
        pid=os.getpid(),
        start=proc.start if proc else 0,
        host=host,
        boot=boot,
        pid_namespace=pid_namespace,
    )


def from_label(text: str) -> Owner | None:
    """The owner that `Owner.label` wrote; None for anything else."""
    parts = text.split("/", 4)
    if len(parts) != 5 or not (parts[0].isdigit() and parts[1].isdigit()):
        return None
    return Owner(pid=int(parts[0]), start=int(parts[1]), boot=parts[2], pid_namespace=parts[3], host=parts[4])


def place() -> tuple[str, str, str]:
    """Host name, boot and pid namespace of this process."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return os.uname().nodename, boot, str(Path("/proc/self/ns/pid").readlink())


def rebooted(owner: Owner) -> bool:
    """Whether this machine was started anew since: then nothing the owner started runs any more."""
    host, boot, _ = place()
    return owner.host == host and owner.boot != boot


def is_dead(owner: Owner) -> bool:
    """Whether the owner is known to have ended. False also where that cannot be seen from here, such as for
    a lab on another machine or in another container."""
    _, boot, pid_namespace = place()
    if rebooted(owner):
        return True
    here = owner.boot == boot and owner.pid_namespace == pid_namespace
    return here and not is_alive(owner.pid, start=owner.start)
