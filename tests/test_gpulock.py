"""One lab at a time on a GPU: locks between real processes, also of different users."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from parts import need

from lab.errors import LabError
from lab.runtime.gpulock import gpus_locked, shared_folder

ROOT = Path(__file__).parent.parent
HOLD = """
import sys
from pathlib import Path
from lab.runtime.gpulock import gpus_locked
with gpus_locked(sys.argv[3:], run_id=sys.argv[2], folder=Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holding(folder: Path, *uuids: str, run_id: str = "run-1") -> Iterator[subprocess.Popen[str]]:
    """Another lab, which holds the GPUs until it is told to end."""
    words = [sys.executable, "-c", HOLD, str(folder), run_id, *uuids]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as lab:
        assert lab.stdout is not None
        assert lab.stdout.readline() == "held\n"
        yield lab


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user reaches; pytest's are for one."""
    made = Path(tempfile.mkdtemp(prefix="lab-test-"))
    made.chmod(0o1777)
    yield made
    shutil.rmtree(made)


def as_user(uid: int, work: Callable[[], object]) -> str:
    """What `work` returns, or the LabError it raises, as text, in a forked child that is another user."""
    need(os.getuid() == 0, "only root can become another user")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            try:
                text = f"{work()}"
            except LabError as error:
                text = f"LabError: {error}"
            except BaseException as error:
                text = f"{error!r}"
            os.write(write, text.encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text


def lock_once(folder: Path, *uuids: str) -> Callable[[], str]:
    def work() -> str:
        with gpus_locked(uuids, run_id="run-2", folder=folder):
            return "held"

    return work


def test_a_second_lab_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    with holding(tmp_path, "GPU-a", "GPU-b") as lab:
        with (
            pytest.raises(LabError, match="GPU GPU-b is taken by another lab") as caught,
            gpus_locked(("GPU-c", "GPU-b"), run_id="run-2", folder=tmp_path),
        ):
            pytest.fail("both hold it")
        assert f"(run run-1, pid {lab.pid})" in caught.value.problem
        assert "--gpus" in str(caught.value)
        with gpus_locked(("GPU-c",), run_id="run-2", folder=tmp_path):
            assert lock_once(tmp_path, "GPU-d")() == "held"
    assert lock_once(tmp_path, "GPU-a", "GPU-b")() == "held"


def test_a_refused_lab_holds_nothing(tmp_path: Path) -> None:
    with holding(tmp_path, "GPU-b"):
        with (
            pytest.raises(LabError, match="GPU-b"),
            gpus_locked(("GPU-a", "GPU-b"), run_id="run-2", folder=tmp_path),
        ):
            pytest.fail("both hold it")
        with holding(tmp_path, "GPU-a", run_id="run-3"):
            assert (tmp_path / "GPU-b.holder").exists()


def test_kill_9_of_the_holder_frees_it(tmp_path: Path) -> None:
    with holding(tmp_path, "GPU-a") as lab:
        lab.kill()
        assert lab.wait() == -signal.SIGKILL
        assert (tmp_path / "GPU-a.holder").exists(), "nobody was there to remove it"
        assert lock_once(tmp_path, "GPU-a")() == "held"
    assert not list(tmp_path.glob("*.holder"))


def test_no_gpus_no_lock(tmp_path: Path) -> None:
    with gpus_locked((), run_id="run-1", folder=tmp_path / "none"):
        assert not (tmp_path / "none").exists()


def test_the_order_of_the_names_does_not_matter(tmp_path: Path) -> None:
    for uuids in (("GPU-a", "GPU-b"), ("GPU-b", "GPU-a")):
        with (
            holding(tmp_path, "GPU-a"),
            pytest.raises(LabError, match="GPU-a"),
            gpus_locked(uuids, run_id="run-2", folder=tmp_path),
        ):
            pytest.fail("both hold it")


def test_every_user_shares_one_folder() -> None:
    assert shared_folder().parent == Path(tempfile.gettempdir())
    assert str(os.getuid()) not in re.findall(r"\d+", shared_folder().name)


# ---- two users


def test_users_take_turns(open_folder: Path) -> None:
    """Also after a lab that was killed, whose files belong to the other user."""
    folder = open_folder / "gpus"
    old = os.umask(0o077)
    try:
        assert as_user(12_345, lock_once(folder, "GPU-a")) == "held"
        assert as_user(23_456, lock_once(folder, "GPU-a")) == "held"

        def killed() -> None:
            with gpus_locked(("GPU-a",), run_id="run-9", folder=folder):
                os._exit(0)

        as_user(12_345, killed)
        assert (folder / "GPU-a.holder").stat().st_uid == 12_345
        assert as_user(23_456, lock_once(folder, "GPU-a")) == "held"
    finally:
        os.umask(old)


def test_one_user_is_told_of_the_other(open_folder: Path) -> None:
    folder = open_folder / "gpus"
    assert as_user(23_456, lock_once(folder, "GPU-a")) == "held"
    with holding(folder, "GPU-a") as lab:
        told = as_user(12_345, lock_once(folder, "GPU-a"))
        assert f"GPU GPU-a is taken by another lab (run run-1, pid {lab.pid})" in told


def test_locks_where_others_files_in_sticky_folders_are_protected(open_folder: Path) -> None:
    """With fs.protected_regular, as most systems have it, a file of another user in a sticky folder that all
    may write to cannot be opened with O_CREAT; the locks' folder is not sticky."""
    setting = Path("/proc/sys/fs/protected_regular")
    need(os.access(setting, os.W_OK), "to set fs.protected_regular")
    before = setting.read_text()
    try:
        setting.write_text("2")
    except OSError as error:
        need(False, f"to set fs.protected_regular: {error}")
    try:
        folder = open_folder / "gpus"
        assert as_user(12_345, lock_once(folder, "GPU-a")) == "held"
        assert as_user(23_456, lock_once(folder, "GPU-a")) == "held"
        assert lock_once(folder, "GPU-a")() == "held"
    finally:
        setting.write_text(before)


def test_a_folder_that_cannot_be_written(open_folder: Path) -> None:
    folder = open_folder / "gpus"
    folder.mkdir(mode=0o755)
    told = as_user(12_345, lock_once(folder, "GPU-a"))
    assert told.startswith("LabError: the GPUs cannot be locked")
    assert f"see that {folder} is a folder and can be written by everybody" in told


def test_a_file_in_the_folders_place(tmp_path: Path) -> None:
    folder = tmp_path / "gpus"
    folder.write_text("")
    with pytest.raises(LabError, match="the GPUs cannot be locked") as caught:
        lock_once(folder, "GPU-a")()
    assert str(folder) in str(caught.value)
