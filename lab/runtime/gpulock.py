"""One lab at a time on a GPU: a lock file a UUID, in a folder that all users of the machine share. The system frees a
lock when its holder ends, however that happens."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lab.errors import LabError


def shared_folder() -> Path:
    """Where the locks lie: the same folder for every user, whatever their home and state folders."""
    return Path(tempfile.gettempdir()) / "sglang-lab-gpus"


@contextmanager
def gpus_locked(uuids: Sequence[str], *, run_id: str, folder: Path) -> Iterator[None]:
    """Hold the GPUs while the block runs; `LabError` naming the other run when one of them is taken."""
    with ExitStack() as held:
        try:
            if uuids:
                _make(folder)
            for uuid in sorted(uuids):  # one order for all labs, so that no two wait for each other
                _lock(uuid, held=held, run_id=run_id, folder=folder)
        except OSError as error:
            raise LabError(
                "the GPUs cannot be locked",
                why=f"{error.strerror}: {error.filename}",
                fix=f"see that {folder} is a folder and can be written by everybody who uses the GPUs",
            ) from error
        yield


def _lock(uuid: str, *, held: ExitStack, run_id: str, folder: Path) -> None:
    try:
        held.enter_context(FileLock(folder / f"{uuid}.lock", mode=0o666, timeout=0))
    except Timeout:
        raise _taken(uuid, folder=folder) from None
    holder = _holder(uuid, folder=folder)
    held.callback(holder.unlink, missing_ok=True)
    holder.unlink(
        missing_ok=True
    )  # a killed lab's, which may be another user's: it cannot be written, but removed
    holder.write_text(f"run {run_id}, pid {os.getpid()}\n", encoding="utf-8")
    holder.chmod(0o644)  # whatever the umask: others are to read it


def _make(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if folder.stat().st_uid == os.getuid():
        folder.chmod(stat.S_IRWXU | stat.S_IRWXG | stat.S_IRWXO)


def _holder(uuid: str, *, folder: Path) -> Path:
    """The file beside the lock that says who holds it."""
    return folder / f"{uuid}.holder"


def _taken(uuid: str, *, folder: Path) -> LabError:
    try:
        who = _holder(uuid, folder=folder).read_text(encoding="utf-8").strip()
    except OSError:
        who = "another lab"
    return LabError(
        f"GPU {uuid} is taken by another lab ({who})",
        why="two experiments on one GPU measure each other",
        fix="wait for it, or name other GPUs with --gpus",
    )
