"""Short-lived folders of trials (HOME, TMPDIR and mailbox of their processes), and the sweep of those left over.

They are made in the system's temporary folder because SGLang puts sockets below TMPDIR, and a socket's path may be no
longer than 107 bytes. The maker's pid stands in the name, so that a later lab can tell which are abandoned."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

import psutil

NAME = re.compile(r"sglang-lab-(\d+)-\w+")


def make() -> Path:
    """A new folder with `home`, `tmp` and `mailbox` in it."""
    folder = Path(tempfile.mkdtemp(prefix=f"sglang-lab-{os.getpid()}-"))
    for name in ("home", "tmp", "mailbox"):
        (folder / name).mkdir()
    return folder


def sweep() -> tuple[Path, ...]:
    """Remove the folders of this user whose lab has ended; returns them."""
    swept = []
    for folder in sorted(Path(tempfile.gettempdir()).glob("sglang-lab-*")):
        match = NAME.fullmatch(folder.name)
        if match and folder.is_dir() and _is_abandoned(folder, pid=int(match[1])):
            shutil.rmtree(folder, ignore_errors=True)
            swept.append(folder)
    return tuple(swept)


def _is_abandoned(folder: Path, *, pid: int) -> bool:
    try:
        made = folder.stat()
        if made.st_uid != os.getuid():
            return False
        # a process that began after the folder was made only shares the pid of the one that made it
        return psutil.Process(pid).create_time() > made.st_mtime + 60
    except psutil.NoSuchProcess:
        return True
    except OSError:
        return False
