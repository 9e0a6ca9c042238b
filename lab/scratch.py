"""Short-lived folders of trials (HOME, TMPDIR and mailbox of their processes), and the sweep of those left over.

They are made in the system's temporary folder because SGLang puts sockets below TMPDIR, and a socket's path may be no
longer than 107 bytes. The maker's pid and start time stand in the name: a later lab can tell which are abandoned."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from lab.runtime.procfs import read_proc

NAME = re.compile(r"sglang-lab-(\d+)-(\d+)-\w+")


def make() -> Path:
    """A new folder with `home`, `tmp` and `mailbox` in it."""
    me = read_proc(os.getpid())
    start = me.start if me else 0
    folder = Path(tempfile.mkdtemp(prefix=f"sglang-lab-{os.getpid()}-{start}-"))
    for name in ("home", "tmp", "mailbox"):
        (folder / name).mkdir()
    return folder


def sweep() -> tuple[Path, ...]:
    """Remove the folders of this user whose lab has ended; returns them."""
    swept = []
    for folder in sorted(Path(tempfile.gettempdir()).glob("sglang-lab-*")):
        match = NAME.fullmatch(folder.name)
        if match and folder.is_dir() and folder.stat().st_uid == os.getuid():
            maker = read_proc(int(match[1]))
            if maker is None or maker.start != int(match[2]):
                shutil.rmtree(folder, ignore_errors=True)
                swept.append(folder)
    return tuple(swept)
