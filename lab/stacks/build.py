"""From a stack's description to a Python environment on disk: `ensure` returns the folder of the built stack,
building it on first use. It is built aside, verified, and moved into place by one rename, under a lock file;
so a folder under its final name is a finished stack, whatever interrupted a build before, and two builds at
once end with one result.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import uv
from filelock import FileLock, Timeout

from lab.errors import LabError
from lab.stack import Stack, check_platform, check_resources, shim_files
from lab.stacks.check import (
    SCHEMA,
    Manifest,
    check,
    installed_versions,
    python_of,
    record,
    shim_hashes,
    site_packages,
    verify,
)
from lab.stacks.lock import Pin, read_lock
from lab.stacks.python import find_python
from lab.stacks.run import Job, Steps, child_env, no_retry

BUILDING = ".building-"
# Installed side by side, each by a pip of its own; the packages in no group make one more. Compiling is
# most of the work, so this keeps all cores busy. torch is alone because it may have to come from another index.
GROUPS = {
    "torch": ("torch",),
    "sglang": ("sglang", "transformers"),
    "numeric": ("numpy", "pandas", "pyarrow", "sympy", "networkx", "torchvision"),
}
UV_TORCH_BACKEND = {"cpu": "cpu"}  # device of a stack -> the name uv has for PyTorch's index of that device


def stack_folder(stack: Stack, *, cache: Path) -> Path:
    """Where the built stack is, or will be."""
    return cache / "stacks" / f"{stack.name}-{stack.lock_hash[:12]}"


def _quiet(_text: str) -> None:
    """Where nothing is shown live."""


def ensure(
    stack: Stack, *, cache: Path, say: Callable[[str], None], live: Callable[[str], None] = _quiet
) -> Path:
    """The folder of the built stack under `cache`; builds it if it is not there (about a minute).

    `say` is given a line when something is worth telling, `live` what goes on right now. Raises `LabError`
    when this machine cannot run the stack, when a built one was damaged, and when a step of the build fails
    (with the step, the log and what to try).
    """
    check_platform(stack)
    folder = stack_folder(stack, cache=cache)
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock_file(folder).touch()
        except OSError as error:
            raise LabError(
                f"cannot write in {folder.parent}, where stack {stack.name!r} is to be built",
                why=str(error),
                fix="make the folder writable and free some space, or set XDG_CACHE_HOME to another one",
            ) from None
        with _locked(folder, say=say):
            if not folder.exists():  # another lab may have built it while this one waited
                _remove_leftovers(folder, say=say)
                check_resources(stack, disk_free_gb=shutil.disk_usage(cache).free / 1e9)
                _build(stack, folder, cache=cache, say=say, live=live)
    check(stack, folder)
    return folder


@contextmanager
def _locked(folder: Path, *, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a stack's folder; the system frees it when its holder dies, however that happens."""
    lock = FileLock(lock_file(folder))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another lab is building this stack; waiting for it (lock: {lock.lock_file})")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def lock_file(folder: Path) -> Path:
    """The file that is locked while `folder` is being built."""
    return folder.with_name(f"{folder.name}.lock")


def _remove_leftovers(folder: Path, *, say: Callable[[str], None]) -> None:
    """Remove what dead builds left: those of this stack, whose lock is ours now, and those whose lock is
    free.
    """
    for left in folder.parent.glob(f"{BUILDING}*"):
        name = left.name.removeprefix(BUILDING).partition("-")[2]
        if name == folder.name:
            say(f"removing an unfinished build: {left}")
            shutil.rmtree(left, ignore_errors=True)
            continue
        try:
            with FileLock(lock_file(folder.with_name(name)), timeout=0):
                say(f"removing an unfinished build: {left}")
                shutil.rmtree(left, ignore_errors=True)
        except Timeout:
            pass  # that build is under way


def _build(
    stack: Stack, folder: Path, *, cache: Path, say: Callable[[str], None], live: Callable[[str], None]
) -> None:
    """Build aside, and move into place when everything is there and verified."""
    started = time.monotonic()
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    logs = cache / "logs" / f"{stack.name}-{stamp}-{os.getpid()}"
    aside = folder.with_name(f"{BUILDING}{os.getpid()}-{folder.name}")
    env = child_env(os.environ)
    steps = Steps(say=say, live=live, logs=logs, env=env)
    say(f"building stack {stack.name!r}, once; later runs find it in {folder}")
    try:
        with steps.step("prepare"):
            logs.mkdir(parents=True)
            aside.mkdir()
        _make(stack, aside=aside, folder=folder, steps=steps, env=env, built=stamp)
        with steps.step("move"):
            aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # not there any more when all went well
    say(f"built stack {stack.name!r} in {time.monotonic() - started:.0f} s (logs: {logs})")


def _make(
    stack: Stack, *, aside: Path, folder: Path, steps: Steps, env: Mapping[str, str], built: str
) -> None:
    """All that a finished stack has, in the folder `aside`; `folder` is where it will be moved."""
    with steps.step("python"):
        python = find_python(stack.python, env=env)
        (steps.logs / "python.log").write_text("\n".join(python.tried) + "\n", encoding="utf-8")
    steps.run(Job(step="create", argv=(str(python.path), "-I", "-m", "venv", "--without-pip", str(aside))))
    steps.run(*_install_jobs(stack, aside, say=steps.say))
    with steps.step("shims"):
        _copy_shims(stack, site_packages(stack, aside))
        _rewrite_paths(aside, folder)
    with steps.step("verify"), tempfile.TemporaryDirectory() as home:
        try:
            imported, missing = verify(stack, aside, env={**env, "HOME": home})
        except LabError as error:  # which speaks of a finished stack
            again = "run the same command again; if it ends like this too, the lock does not fit"
            raise LabError("what was installed is not what it should be", why=error.why, fix=again) from None
        manifest = Manifest(
            schema=SCHEMA,
            stack=stack.name,
            lock_hash=stack.lock_hash,
            built_utc=built,
            python=f"{python.version} from {python.path}",
            versions=installed_versions(stack, aside),
            imported=imported,
            missing_on_purpose=missing,
            shims=shim_hashes(stack, stack.shims),
            size_bytes=_size_of(aside),
            seconds=dict(steps.seconds),
        )
        record(stack, aside, manifest=manifest)


def _install_jobs(stack: Stack, aside: Path, *, say: Callable[[str], None]) -> tuple[Job, ...]:
    """One pip for each group of packages, side by side: with --no-deps each only adds its own files."""
    groups: dict[str, list[Pin]] = {}
    for pin in read_lock(stack.lock):
        step = next((step for step, names in GROUPS.items() if pin.name in names), "packages")
        groups.setdefault(step, []).append(pin)
    jobs = []
    for step, pins in groups.items():
        file = aside / f"lab-{step}.txt"
        file.write_text("".join(pin.text for pin in pins), encoding="utf-8")
        retry = _torch_from_uv(stack, aside, file, say=say) if step == "torch" else no_retry
        jobs.append(Job(step=step, argv=_pip(aside, file), retry=retry))
    return tuple(jobs)


def _pip(aside: Path, file: Path) -> tuple[str, ...]:
    """The lab's own pip, run by the stack's Python as `pip --python` does, in one process instead of two."""
    pip = importlib.util.find_spec("pip")
    if pip is None or pip.origin is None:
        raise LabError(
            "the lab's environment has no pip", fix="python -m ensurepip, or install the lab again"
        )
    return (
        *(str(python_of(aside)), "-I", str(Path(pip.origin).with_name("__pip-runner__.py")), "install"),
        *("--no-deps", "--require-hashes", "--only-binary", ":all:", "--compile", "--progress-bar", "off"),
        *("--requirement", str(file)),
    )


def _torch_from_uv(
    stack: Stack, aside: Path, file: Path, *, say: Callable[[str], None]
) -> Callable[[str], tuple[str, ...] | None]:
    """When the index pip is set up with has no such torch, and only then: PyTorch's own, which uv knows."""

    def retry(log: str) -> tuple[str, ...] | None:
        if "No matching distribution found for torch" not in log:
            return None
        say(
            f"the index that pip is set up with has no torch {stack.torch}; "
            "asking PyTorch's own index through uv"
        )
        return (
            *(uv.find_uv_bin(), "pip", "install", "--python", str(python_of(aside))),
            *("--torch-backend", UV_TORCH_BACKEND[stack.device], "--no-deps", "--require-hashes"),
            *("--only-binary", ":all:", "--compile-bytecode", "--no-progress", "--requirement", str(file)),
        )

    return retry


def _copy_shims(stack: Stack, site: Path) -> None:
    for file in shim_files(stack.folder):
        target = site / file.relative_to(stack.shims)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def _rewrite_paths(aside: Path, folder: Path) -> None:
    """Put the final folder's name where venv and pip wrote that of building: in pyvenv.cfg and bin/."""
    for file in (aside / "pyvenv.cfg", *(aside / "bin").iterdir()):
        if file.is_file() and not file.is_symlink():
            content = file.read_bytes()
            if aside.name.encode() in content:
                file.write_bytes(content.replace(aside.name.encode(), folder.name.encode()))


def _size_of(folder: Path) -> int:
    """Bytes of all files under `folder`."""
    return sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir() or file.is_symlink())
